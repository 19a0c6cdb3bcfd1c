//! The crates know each other in one direction only, and so do the modules of a crate.

#![allow(clippy::unwrap_used, reason = "a test's own steps may unwrap")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;

/// Each crate of the workspace with those that it may name, the lowest first. A new edge is a decision: it must not
/// make a pure crate depend on a shell, nor one shell on another without need.
const ALLOWED: [(&str, &[&str]); 28] = [
    ("atomic-file", &[]),
    ("cow-map", &[]),
    ("etcd-schema", &[]),
    ("netfilter", &[]),
    ("netlink", &[]),
    ("packet", &[]),
    ("text", &[]),
    ("keys", &["atomic-file", "etcd-schema"]),
    ("mesh", &["cow-map", "etcd-schema"]),
    ("policy", &["etcd-schema", "packet"]),
    ("api-types", &["mesh", "policy"]),
    ("kernel", &["atomic-file", "cow-map", "mesh", "netfilter", "netlink", "text"]),
    ("prober", &["etcd-schema", "keys", "mesh"]),
    ("tunnel", &["cow-map", "etcd-schema", "keys", "mesh", "packet"]),
    ("control-core", &["cow-map", "etcd-schema", "mesh", "text"]),
    ("node-core", &["control-core", "cow-map", "etcd-schema", "mesh"]),
    ("mesh-sim", &["control-core", "etcd-schema", "mesh", "node-core"]),
    ("control", &["atomic-file", "control-core", "etcd-schema", "mesh", "text"]),
    ("program", &["control", "text"]),
    ("sync-core", &["control-core", "etcd-schema", "mesh", "policy"]),
    ("sync", &["control", "control-core", "etcd-schema", "mesh", "program", "sync-core", "text"]),
    ("mesh-etcd", &["control-core", "etcd-schema", "program", "sync-core"]),
    ("cni", &["atomic-file", "netlink"]),
    ("attachments", &["atomic-file", "cni", "etcd-schema", "mesh", "netlink"]),
    (
        "enforcement",
        &[
            "api-types",
            "attachments",
            "cni",
            "control-core",
            "cow-map",
            "etcd-schema",
            "mesh",
            "netfilter",
            "netlink",
            "packet",
            "policy",
            "tunnel",
        ],
    ),
    ("api", &["api-types", "attachments", "cni", "etcd-schema", "keys", "text"]),
    (
        "meshd",
        &[
            "api",
            "api-types",
            "atomic-file",
            "attachments",
            "cni",
            "control",
            "control-core",
            "cow-map",
            "enforcement",
            "etcd-schema",
            "kernel",
            "keys",
            "mesh",
            "netfilter",
            "netlink",
            "node-core",
            "packet",
            "policy",
            "prober",
            "program",
            "sync-core",
            "text",
            "tunnel",
        ],
    ),
    ("integration", &["cni", "etcd-schema", "policy"]),
];

#[test]
fn crates_name_only_those_below_them() {
    let cargo =
        Command::new(env!("CARGO")).args(["metadata", "--no-deps", "--format-version", "1", "--offline"]).output();
    let metadata: Value = serde_json::from_slice(&cargo.unwrap().stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    let names: Vec<&str> = packages.iter().map(|package| package["name"].as_str().unwrap()).collect();
    let found: BTreeMap<&str, Vec<&str>> = packages
        .iter()
        .map(|package| {
            let dependencies = package["dependencies"].as_array().unwrap().iter();
            let own = dependencies.filter(|dependency| dependency["kind"].is_null());
            let mut own: Vec<&str> = own
                .map(|dependency| dependency["name"].as_str().unwrap())
                .filter(|name| names.contains(name))
                .collect();
            own.sort_unstable();
            (package["name"].as_str().unwrap(), own)
        })
        .collect();
    let allowed: BTreeMap<&str, Vec<&str>> = ALLOWED.iter().map(|(name, below)| (*name, below.to_vec())).collect();
    assert_eq!(found, allowed);
    for (place, (_, below)) in ALLOWED.iter().enumerate() {
        for name in *below {
            assert!(
                ALLOWED[..place].iter().any(|(lower, _)| lower == name),
                "{name} is not below the crate that names it"
            );
        }
    }
}

/// A module with content of its own is `x.rs`, and what is below it is in `x/`; unit tests are a module `tests`, the last
/// item of their file; what a file imports from one crate, or from above itself, is one `use`.
#[test]
fn files_have_one_style() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let listed = Command::new("git").args(["ls-files", "-co", "--exclude-standard", "*.rs"]).current_dir(root).output();
    let listed = String::from_utf8(listed.unwrap().stdout).unwrap();
    let mut found = Vec::new();
    for file in listed.lines().filter(|file| root.join(file).is_file()) {
        // Cargo takes any other file there for a benchmark.
        if file.ends_with("/mod.rs") && !file.contains("/benches/") {
            found.push(format!("{file}: is the file {}.rs", file.trim_end_matches("/mod.rs")));
        }
        let text = fs::read_to_string(root.join(file)).unwrap();
        found.extend(twice_imported(&text).into_iter().map(|name| format!("{file}: one `use` of {name}")));
        if tests_are_misplaced(&text) {
            found.push(format!("{file}: tests are the last item, in a module `tests`"));
        }
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn a_second_import_and_tests_in_the_middle_are_found() {
    assert_eq!(twice_imported("use std::fs;\nuse a::b;\nuse std::{\n    io,\n};\npub use std::net;\n"), ["std"]);
    assert!(twice_imported("use a::b;\n#[cfg(test)]\nuse a::c;\nmod tests {\n    use a::d;\n}\n").is_empty());
    assert!(!tests_are_misplaced("fn f() {}\n\n#[cfg(test)]\nmod tests;\n"));
    assert!(!tests_are_misplaced("fn f() {}\n#[cfg(test)]\nmod tests {\n    fn g() {}\n}\n"));
    assert!(tests_are_misplaced("#[cfg(test)]\nmod tests {\n    fn g() {}\n}\n\nfn f() {}\n"));
    assert!(tests_are_misplaced("fn f() {}\n#[cfg(test)]\nmod test {\n    fn g() {}\n}\n"));
    assert!(tests_are_misplaced("#[cfg(test)]\nmod tests;\n\nfn f() {}\n"));
}

/// The crates, and `super` and `crate`, of which a file has two imports with the same visibility.
fn twice_imported(text: &str) -> Vec<&str> {
    let mut seen = BTreeSet::new();
    let mut twice = Vec::new();
    let mut before = "";
    for line in text.lines() {
        let (public, import) = line.split_once("use ").unwrap_or_default();
        let root = import.split(&[':', ';'][..]).next().unwrap_or_default();
        let is_import = !root.is_empty() && (public.is_empty() || public.starts_with("pub")) && import.contains("::");
        if is_import && !before.starts_with("#[") && !seen.insert((public, root)) {
            twice.push(root);
        }
        before = line;
    }
    twice
}

/// Whether a module of tests with content has another name, or the file goes on behind it or its declaration.
fn tests_are_misplaced(text: &str) -> bool {
    const DECLARED: &str = "#[cfg(test)]\nmod tests;\n";
    let mut inline = text.split("#[cfg(test)]\nmod ").skip(1).filter_map(|tests| {
        let (name, body) = tests.split_once(" {\n")?;
        (!name.contains([';', '\n'])).then(|| (name, body.split_once("\n}\n").map_or("", |(_, behind)| behind)))
    });
    let misplaced = inline.any(|(name, behind)| name != "tests" || !behind.trim().is_empty());
    misplaced || (text.contains(DECLARED) && !text.ends_with(DECLARED))
}

/// Modules of one folder do not name each other in a circle.
#[test]
fn modules_of_a_crate_make_no_circles() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut crates = vec![root.join("policy"), root.join("cni"), root.join("etcd-schema"), root.join("meshd")];
    crates.extend(fs::read_dir(root.join("meshd/crates")).unwrap().map(|entry| entry.unwrap().path()));
    let mut found: Vec<String> = Vec::new();
    for own in crates {
        let name = own.file_name().unwrap().to_str().unwrap();
        for circle in Modules::read(&own.join("src")).circles() {
            let modules: Vec<String> = circle.iter().map(|module| module.join("::")).collect();
            found.push(format!("{name}: {}", modules.join(", ")));
        }
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
}

/// Reads an import as rustc would: a circle is found where its modules hide behind their folder's re-exports, too.
#[test]
fn a_circle_is_found_through_re_exports_and_not_in_tests() {
    let modules = |texts: &[(&str, &str)]| {
        let texts =
            texts.iter().map(|(path, text)| (path.split("::").map(str::to_owned).collect(), (*text).to_owned()));
        Modules::of(texts.collect())
    };
    let circles = |texts: &[(&str, &str)]| modules(texts).circles().len();
    assert_eq!(circles(&[("a", "use crate::b::{c, d::E};"), ("b", "fn f() -> crate::a::T {}")]), 1);
    assert_eq!(circles(&[("a", "use crate::b;"), ("b", "#[cfg(test)]\nmod tests {\n    use crate::a;\n}")]), 0);
    let folder = "mod a;\nmod b;\npub(crate) use a::{One, Two};";
    let (a, b) = (("f::a", "use super::b::X;"), ("f::b", "use super::{Two, other};"));
    assert_eq!(circles(&[("f", folder), a, b]), 1);
    assert_eq!(circles(&[("f", "mod a;\nmod b;"), a, b]), 0, "Two is the folder's own");
    assert_eq!(circles(&[("f", "use a::One;"), ("f::a", "use super::Own;")]), 0, "a folder and its content");
}

/// A problem's code has one cause and one remedy, or one function that has them all.
#[test]
fn each_code_of_a_problem_is_built_in_one_place() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let listed =
        Command::new("git").args(["ls-files", "meshd/src/*.rs", "meshd/crates/*.rs"]).current_dir(root).output();
    let mut built: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for file in String::from_utf8(listed.unwrap().stdout).unwrap().lines() {
        let is_test = ["tests", "testing", "fixtures", "benches"].iter().any(|part| file.contains(part));
        if !is_test && root.join(file).is_file() {
            let text = without_tests(&fs::read_to_string(root.join(file)).unwrap());
            for code in built_codes(&text) {
                built.entry(code).or_default().push(file.to_owned());
            }
        }
    }
    assert!(built.len() > 40, "{built:?}");
    built.retain(|_, files| files.len() > 1);
    assert!(built.is_empty(), "built in several places: {built:?}");
}

/// The codes of the problems and findings that `text` builds.
fn built_codes(text: &str) -> Vec<String> {
    let joined = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let behind = |marker| joined.split(marker).skip(1).collect::<Vec<_>>();
    let of = ["Problem::new(", "Finding::new(", " problem(", "(problem(", " code: "].map(behind).concat();
    let codes = of.into_iter().filter_map(|built| {
        let built = built.trim_start();
        let built = built.strip_prefix("Severity::").map_or(built, |rest| rest.split_once(", ").unwrap_or_default().1);
        let code = built.strip_prefix("ProblemCode::")?;
        Some(code.chars().take_while(char::is_ascii_alphanumeric).collect())
    });
    codes.collect()
}

#[test]
fn a_built_problem_is_told_from_a_question_for_its_code() {
    let text = "Problem::new(\n    ProblemCode::One, cause)\nFinding::new(Severity::Error, ProblemCode::Two, x)
        Problem { code: ProblemCode::Three, key }; found.is(ProblemCode::Four); code == ProblemCode::Five";
    assert_eq!(built_codes(text), ["One", "Two", "Three"]);
}

/// The path of a module inside its crate.
type ModulePath = Vec<String>;

/// The modules of a crate, each with the paths that its code names, test code left out.
struct Modules {
    named: BTreeMap<ModulePath, Vec<ModulePath>>,
    /// Names that a module has from its children.
    imported: BTreeMap<ModulePath, BTreeMap<String, ModulePath>>,
}

impl Modules {
    fn read(folder: &Path) -> Self {
        let mut texts = BTreeMap::new();
        let mut folders: Vec<PathBuf> = vec![folder.to_owned()];
        while let Some(below) = folders.pop() {
            for entry in fs::read_dir(&below).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                    continue;
                }
                let module = path.with_extension("");
                let module = module.strip_prefix(folder).unwrap().iter().map(|part| part.to_str().unwrap().to_owned());
                let mut module: ModulePath = module.collect();
                let test = |part: &String| ["tests", "testing", "fixtures", "bin"].contains(&part.as_str());
                if path.extension().is_none_or(|extension| extension != "rs") || module.iter().any(test) {
                    continue;
                }
                module.pop_if(|last| ["mod", "lib", "main"].contains(&last.as_str()));
                texts.insert(module, fs::read_to_string(&path).unwrap());
            }
        }
        Self::of(texts)
    }

    fn of(texts: BTreeMap<ModulePath, String>) -> Self {
        let named: BTreeMap<ModulePath, Vec<ModulePath>> =
            texts.into_iter().map(|(module, text)| (module, paths(&without_tests(&text)))).collect();
        let mut imported: BTreeMap<ModulePath, BTreeMap<String, ModulePath>> = BTreeMap::new();
        for (module, paths) in &named {
            for path in paths {
                let path = path.strip_prefix(&["self".to_owned()]).unwrap_or(path);
                let [child, .., name] = path else { continue };
                let child = [module.as_slice(), std::slice::from_ref(child)].concat();
                if named.contains_key(&child) {
                    imported.entry(module.clone()).or_default().insert(name.clone(), child);
                }
            }
        }
        Self { named, imported }
    }

    /// The module that `path` leads to when `from` names it.
    fn resolve(&self, from: &ModulePath, path: &[String]) -> Option<ModulePath> {
        let mut at = from.clone();
        let mut rest = path.iter().peekable();
        match rest.peek()?.as_str() {
            "crate" => {
                at.clear();
                rest.next();
            }
            "self" => drop(rest.next()),
            "super" => {
                while rest.next_if(|part| *part == "super").is_some() {
                    at.pop();
                }
            }
            first => {
                let child = [at.as_slice(), &[first.to_owned()]].concat();
                self.named.get(&child)?;
            }
        }
        for part in rest {
            let child = [at.as_slice(), std::slice::from_ref(part)].concat();
            if self.named.contains_key(&child) {
                at = child;
            } else if let Some(child) = self.imported.get(&at).and_then(|names| names.get(part)) {
                at.clone_from(child);
            } else {
                break;
            }
        }
        Some(at)
    }

    /// Sets of modules beside each other that name one another, or what is below them, in a circle.
    fn circles(&self) -> BTreeSet<Vec<ModulePath>> {
        let mut edges: BTreeMap<ModulePath, BTreeSet<ModulePath>> = BTreeMap::new();
        for (module, paths) in &self.named {
            for to in paths.iter().filter_map(|path| self.resolve(module, path)) {
                let common = module.iter().zip(&to).take_while(|(one, other)| one == other).count();
                if common < module.len() && common < to.len() {
                    edges.entry(module[..=common].to_vec()).or_default().insert(to[..=common].to_vec());
                }
            }
        }
        let reached = |from: &ModulePath| {
            let (mut reached, mut open) = (BTreeSet::new(), vec![from]);
            while let Some(at) = open.pop() {
                open.extend(edges.get(at).into_iter().flatten().filter(|next| reached.insert((*next).clone())));
            }
            reached
        };
        let reached: BTreeMap<&ModulePath, BTreeSet<ModulePath>> =
            edges.keys().map(|module| (module, reached(module))).collect();
        let circle = |module: &ModulePath| {
            let back = |other: &&ModulePath| reached.get(other).is_some_and(|reached| reached.contains(module));
            reached[module].iter().filter(back).cloned().collect::<Vec<_>>()
        };
        edges.keys().map(circle).filter(|circle| !circle.is_empty()).collect()
    }
}

/// The code without comments, strings and the tests at its end.
fn without_tests(text: &str) -> String {
    let mut code = String::new();
    let mut lines = text.lines().peekable();
    while let Some(line) = lines.next() {
        // A module that is declared is in a file of its own; one with a body is the end of the file.
        let body = |next: &&str| next.contains("mod ") && next.ends_with('{');
        if line.starts_with("#[cfg(") && line.contains("test") && lines.peek().is_some_and(body) {
            break;
        }
        code.push_str(line.split("//").next().unwrap_or_default());
        code.push('\n');
    }
    code
}

/// The paths that code names: those of imports, and those with `crate`, `super` or `self` in front.
fn paths(code: &str) -> Vec<ModulePath> {
    let mut paths = Vec::new();
    for (at, _) in code.match_indices("use ") {
        let begins = code[..at].rsplit('\n').next().unwrap_or_default().trim();
        if begins.is_empty() || begins.starts_with("pub") {
            let tree: String = code[at + 4..].chars().take_while(|c| *c != ';').filter(|c| *c != '\n').collect();
            expand("", &tree, &mut paths);
        }
    }
    let word = |c: char| c.is_alphanumeric() || c == '_' || c == ':';
    for part in code.split(|c: char| !word(c)) {
        if ["crate::", "super::", "self::"].iter().any(|start| part.starts_with(start)) {
            paths.push(split(part));
        }
    }
    paths
}

fn split(path: &str) -> ModulePath {
    path.split("::").map(|part| part.trim().to_owned()).filter(|part| !part.is_empty()).collect()
}

/// The paths of a tree of imports: `a::{b, c::{d as e}}` is `a::b` and `a::c::d`.
fn expand(prefix: &str, tree: &str, into: &mut Vec<ModulePath>) {
    let Some((head, inner)) = tree.split_once('{') else {
        let path = format!("{prefix}{}", tree.split(" as ").next().unwrap_or_default());
        return into.push(split(&path));
    };
    let (prefix, inner) =
        (format!("{prefix}{}", head.trim()), inner.rsplit_once('}').map_or(inner, |(inner, _)| inner));
    let (mut depth, mut start) = (0, 0);
    for (at, c) in inner.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                expand(&prefix, &inner[start..at], into);
                start = at + 1;
            }
            _ => {}
        }
    }
    if !inner[start..].trim().is_empty() {
        expand(&prefix, &inner[start..], into);
    }
}
