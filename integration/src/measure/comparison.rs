//! Figures of several subjects that take turns, as tables and as JSON.

use std::{
    env, fmt, fs, io,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};

use super::{Machine, Series};

/// Figures of several subjects. The first subject that is recorded is the one that the others are compared
/// with.
#[derive(Debug, Clone)]
pub struct Comparison {
    name: String,
    title: String,
    notes: Vec<String>,
    metrics: Vec<Metric>,
}

/// One figure of all subjects.
#[derive(Debug, Clone)]
pub struct Metric {
    name: String,
    better: Better,
    rows: Vec<(String, Series)>,
}

/// Which of two values of a figure is the better one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Better {
    /// The higher.
    Higher,
    /// The lower.
    Lower,
}

impl Comparison {
    /// Without figures. `name` becomes the file's, so it is made of letters, digits and hyphens; `title` stands over
    /// the tables.
    #[must_use]
    pub fn new(name: &str, title: &str) -> Self {
        Self { name: name.to_owned(), title: title.to_owned(), notes: Vec::new(), metrics: Vec::new() }
    }

    /// Adds a subject's next value of a figure. `metric` names the figure with its unit.
    pub fn record(&mut self, metric: &str, better: Better, subject: &str, value: f64) {
        let at = self.metrics.iter().position(|known| known.name == metric).unwrap_or_else(|| {
            self.metrics.push(Metric { name: metric.to_owned(), better, rows: Vec::new() });
            self.metrics.len() - 1
        });
        let rows = &mut self.metrics[at].rows;
        let row = rows.iter().position(|(name, _)| name == subject).unwrap_or_else(|| {
            rows.push((subject.to_owned(), Series::default()));
            rows.len() - 1
        });
        rows[row].1.push(value);
    }

    /// One more value of `metric`, of which less is better, of `subject`.
    pub fn lower(&mut self, subject: &str, metric: &str, value: f64) {
        self.record(metric, Better::Lower, subject, value);
    }

    /// Adds a sentence below the title.
    pub fn note(&mut self, sentence: impl Into<String>) {
        self.notes.push(sentence.into());
    }

    /// The figures.
    #[must_use]
    pub fn metrics(&self) -> &[Metric] {
        &self.metrics
    }

    /// Writes all values to `bench/NAME.json` in the target folder, and returns the path.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write_json(&self, machine: &Machine, versions: &[String]) -> io::Result<PathBuf> {
        let folder = target_folder()?.join("bench");
        fs::create_dir_all(&folder)?;
        let path = folder.join(format!("{}.json", self.name));
        fs::write(&path, format!("{:#}\n", self.json(machine, versions)))?;
        Ok(path)
    }

    fn json(&self, machine: &Machine, versions: &[String]) -> Value {
        let metrics: Vec<Value> = self.metrics.iter().map(Metric::json).collect();
        json!({
            "name": self.name,
            "title": self.title,
            "notes": self.notes,
            "machine": machine.json(),
            "versions": versions,
            "metrics": metrics,
        })
    }
}

impl fmt::Display for Comparison {
    /// A heading, and a Markdown table for each figure; one for all of them where there is nothing to compare.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "### {}: {}", self.name, self.title)?;
        for note in &self.notes {
            writeln!(f, "\n{note}")?;
        }
        if self.metrics.iter().any(|metric| metric.rows.len() > 1) {
            return self.metrics.iter().try_for_each(|metric| write!(f, "\n{metric}"));
        }
        writeln!(f, "\n| figure | median | quartiles | least, greatest | all, in turn |")?;
        writeln!(f, "|---|---|---|---|---|")?;
        for metric in &self.metrics {
            let Some((_, series)) = metric.rows.first() else { continue };
            writeln!(f, "| {} | {} | {} |", metric.name, summary(series), all(series))?;
        }
        Ok(())
    }
}

impl Metric {
    /// Its name, with the unit.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The values of a subject.
    #[must_use]
    pub fn of(&self, subject: &str) -> Option<&Series> {
        self.rows.iter().find(|(name, _)| name == subject).map(|(_, series)| series)
    }

    /// The first subject's values divided by that one's, turn by turn.
    #[must_use]
    pub fn ratios(&self, subject: &str) -> Option<Series> {
        let (_, first) = self.rows.first()?;
        self.of(subject).map(|series| first.ratios(series))
    }

    /// The quarter of the ratios that the first subject has no reason to be proud of begins here.
    fn bad_quartile(&self, ratios: &Series) -> f64 {
        match self.better {
            Better::Higher => ratios.quantile(0.25),
            Better::Lower => ratios.quantile(0.75),
        }
    }

    fn json(&self) -> Value {
        let rows: Vec<Value> = self
            .rows
            .iter()
            .map(|(subject, series)| {
                let ratios = self.ratios(subject).unwrap_or_default();
                json!({
                    "subject": subject,
                    "values": series.values(),
                    "median": series.median(),
                    "quartiles": [series.quantile(0.25), series.quantile(0.75)],
                    "ratios": ratios.values(),
                    "ratioMedian": ratios.median(),
                    "ratioBadQuartile": self.bad_quartile(&ratios),
                })
            })
            .collect();
        json!({"name": self.name, "higherIsBetter": self.better == Better::Higher, "subjects": rows})
    }
}

impl fmt::Display for Metric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some((first, _)) = self.rows.first() else { return Ok(()) };
        let quartile = match self.better {
            Better::Higher => "lower",
            Better::Lower => "upper",
        };
        writeln!(
            f,
            "| {} | median | quartiles | least, greatest | {first} ÷ this: median | {quartile} quartile | all, in turn |",
            self.name
        )?;
        writeln!(f, "|---|---|---|---|---|---|---|")?;
        for (subject, series) in &self.rows {
            let ratios = self.ratios(subject).unwrap_or_default();
            let ratio = |value: f64| if ratios.values().is_empty() { "–".to_owned() } else { format!("{value:.2}") };
            writeln!(
                f,
                "| {subject} | {} | {} | {} | {} |",
                summary(series),
                ratio(ratios.median()),
                ratio(self.bad_quartile(&ratios)),
                all(series)
            )?;
        }
        Ok(())
    }
}

/// Median, quartiles, least and greatest: three cells of a table.
fn summary(series: &Series) -> String {
    format!(
        "**{}** | {}–{} | {}, {}",
        short(series.median()),
        short(series.quantile(0.25)),
        short(series.quantile(0.75)),
        short(series.least()),
        short(series.greatest())
    )
}

fn all(series: &Series) -> String {
    let all: Vec<String> = series.values().iter().map(|value| short(*value)).collect();
    all.join(" ")
}

/// Three significant digits and never an exponent.
fn short(value: f64) -> String {
    let digits = match value.abs() {
        size if size >= 100.0 => 0,
        size if size >= 10.0 => 1,
        size if size >= 1.0 || size == 0.0 => 2,
        _ => 3,
    };
    format!("{value:.digits$}")
}

/// Where cargo builds to: the folder above the profile's, in which this program is.
fn target_folder() -> io::Result<PathBuf> {
    let own = env::current_exe()?;
    // …/target/PROFILE/deps/benchmark
    let folder = own.ancestors().nth(3).map(Path::to_owned);
    folder.ok_or_else(|| io::Error::other(format!("{} lies in no target folder", own.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn comparison() -> Comparison {
        let mut comparison = Comparison::new("tcp-1", "one stream");
        for (a, b) in [(4.0, 2.0), (6.0, 2.0), (5.0, 2.5)] {
            comparison.record("Gbit/s", Better::Higher, "ours", a);
            comparison.record("Gbit/s", Better::Higher, "theirs", b);
        }
        comparison
    }

    #[test]
    fn ratios_are_those_of_the_first_subject_to_the_others() {
        let comparison = comparison();
        let metric = &comparison.metrics()[0];
        assert_eq!(metric.ratios("theirs").unwrap().values(), [2.0, 3.0, 2.0]);
        assert_eq!(metric.ratios("ours").unwrap().median(), 1.0);
        assert_eq!(metric.ratios("nobody"), None);
    }

    #[test]
    fn a_table_has_every_value() {
        let text = comparison().to_string();
        assert!(
            text.contains("| theirs | **2.00** | 2.00–2.25 | 2.00, 2.50 | 2.00 | 2.00 | 2.00 2.00 2.50 |"),
            "{text}"
        );
    }

    #[test]
    fn one_subject_is_one_table() {
        let mut comparison = Comparison::new("scale", "alone");
        comparison.record("RSS, MB", Better::Lower, "ours", 12.0);
        comparison.record("CPU, %", Better::Lower, "ours", 0.5);
        let text = comparison.to_string();
        assert!(text.contains("| RSS, MB | **12.0** | 12.0–12.0 | 12.0, 12.0 | 12.0 |\n| CPU, % |"), "{text}");
    }

    #[test]
    fn json_has_every_value() {
        let json = comparison().json(&Machine::this(), &[]);
        assert_eq!(json["metrics"][0]["subjects"][0]["values"], json!([4.0, 6.0, 5.0]));
        assert_eq!(json["metrics"][0]["higherIsBetter"], true);
    }
}
