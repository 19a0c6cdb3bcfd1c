//! The name that a misspelt one may mean.

/// Of names that differ by two characters at most, the one that differs least.
pub(crate) fn nearest(known: &[&'static str], name: &str) -> Option<&'static str> {
    const FAR: usize = 3;
    let distances = known.iter().map(|known| (distance(known, name), *known));
    distances.filter(|(distance, _)| *distance < FAR).min().map(|(_, known)| known)
}

/// Characters to put in, take out or exchange (Levenshtein), whatever their case.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, a) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, b) in b.iter().enumerate() {
            let exchanged = diagonal + usize::from(!a.eq_ignore_ascii_case(b));
            diagonal = row[j + 1];
            row[j + 1] = exchanged.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}
