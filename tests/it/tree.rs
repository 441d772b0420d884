//! Names are true: each file, test, function and statement that a comment, a list or a document names exists. Layers
//! hold: no part of the server names a crate that belongs to another layer.

use std::collections::BTreeMap;

use absurd_tests::root;

/// The text of each file by its path; empty for a file of another type than [`TEXTS`].
type Files = BTreeMap<String, String>;

/// Endings of the files that are read, and that mark a word in backquotes as a path.
const TEXTS: [&str; 5] = [".rs", ".sql", ".proto", ".md", ".toml"];
/// Folders that git ignores or that lie beside the tree, and the inputs of the fuzzer.
const SKIPPED: [&str; 9] =
    ["target", "node_modules", "__pycache__", "generated", "build", "artifacts", "coverage", "corpus", "shared"];
/// Documents beside those in `docs/`. The changelog is left out: it names things that are gone.
const DOCUMENTS: [&str; 4] = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md"];
/// Files whose lists of texts hold names of statements.
const LISTS: [&str; 3] = ["server/src/store/statement.rs", "server/src/store/failing.rs", "tests/it/plans.rs"];

/// A crate, and the only part of the server that may name it.
const OWNERS: [(&str, &str); 2] = [("tokio_postgres", "server/src/store"), ("tonic", "server/src/transport")];
/// Parts of the server that do no I/O.
const PURE: [&str; 2] = ["server/src/domain", "server/src/scope.rs"];
/// Files that name a crate of another layer today: file, crate, reason.
const EXCEPTIONS: &[(&str, &str, &str)] = &[
    ("server/src/app.rs", "tokio_postgres", "holds the parsed database URL before the store exists"),
    ("server/src/app.rs", "tonic", "builds the gRPC server"),
    ("server/src/cli/bench.rs", "tokio_postgres", "connects to the database beside the measured server"),
    ("server/src/cli/bench/idle.rs", "tokio_postgres", "counts the transactions of Postgres"),
    ("server/src/cli/bench/load.rs", "tokio_postgres", "prepares and measures queues by plain SQL"),
    ("server/src/cli/bench/overload.rs", "tonic", "calls the service by its generated client"),
    ("server/src/cli/bench/rpcs.rs", "tonic", "calls the service by its generated client"),
    ("server/src/cli/dev.rs", "tokio_postgres", "creates the database of the private Postgres"),
    ("server/src/cli/doctor.rs", "tokio_postgres", "turns rows of the store into findings"),
    ("server/src/cli/operate.rs", "tonic", "prints the results of health checks"),
    ("server/src/cli/reach.rs", "tonic", "asks for the health of a server"),
    ("server/src/cli/serve.rs", "tokio_postgres", "logs the host, port and name of the database"),
    ("server/src/counts.rs", "tokio_postgres", "shares a row of the store between calls"),
    ("server/src/doorbell.rs", "tokio_postgres", "passes the database of the LISTEN connection to the store"),
    ("server/src/gate.rs", "tonic", "gives the transport its sockets"),
    ("server/src/libpq.rs", "tokio_postgres", "turns a database URL into a configuration"),
    ("server/src/settings.rs", "tokio_postgres", "turns settings into a configuration"),
    ("server/src/transport/checkpoints.rs", "tokio_postgres", "renders rows of the store"),
    ("server/src/transport/convert.rs", "tokio_postgres", "renders rows of the store"),
    ("server/src/transport/page_token.rs", "tokio_postgres", "cuts pages of rows of the store"),
    ("server/src/transport/policies.rs", "tokio_postgres", "renders rows of the store"),
    ("server/src/transport/reads.rs", "tokio_postgres", "renders rows of the store"),
    ("server/src/transport/workflows.rs", "tokio_postgres", "renders rows of the store"),
];

/// Reads the tree.
fn tree() -> Files {
    let top = root();
    let mut files = Files::new();
    let mut folders = vec![top.clone()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(&top).unwrap().to_str().unwrap().to_owned();
            if path.is_dir() {
                let last = name.rsplit('/').next().unwrap_or_default();
                if !last.starts_with('.') && !SKIPPED.contains(&last) {
                    folders.push(path);
                }
            } else {
                let is_text = TEXTS.iter().any(|end| name.ends_with(end));
                let text = if is_text { std::fs::read_to_string(&path).unwrap() } else { String::new() };
                files.insert(name, text);
            }
        }
    }
    files
}

/// The words in backquotes of a file, each with its line: of code those in comments, of a document all.
fn quoted<'a>(path: &str, text: &'a str) -> Vec<(usize, &'a str)> {
    let is_document = DOCUMENTS.contains(&path) || path.starts_with("docs/");
    let mark = match path.rsplit('.').next() {
        Some("rs" | "proto") => "//",
        Some("sql") => "--",
        Some("md") if is_document => "",
        _ => return Vec::new(),
    };
    let comments = text.lines().enumerate().filter_map(|(index, line)| Some((index + 1, &line[line.find(mark)?..])));
    comments.flat_map(|(line, comment)| comment.split('`').skip(1).step_by(2).map(move |word| (line, word))).collect()
}

/// The texts between quotes in the lists of a file, each with its line.
fn listed(text: &str) -> Vec<(usize, &str)> {
    let mut inside = false;
    let mut names = Vec::new();
    for (index, line) in text.lines().enumerate() {
        inside |= line.contains(": &[&str] = &[");
        if inside {
            names.extend(line.split('"').skip(1).step_by(2).map(|name| (index + 1, name)));
        }
        inside &= !line.contains("];");
    }
    names
}

/// Whether a word is the path of a file of the tree. A word that begins with a dot is an ending.
fn is_path(word: &str) -> bool {
    let is_foreign = word.starts_with(['.', '~', '/', '@']) || word.contains([' ', ':']);
    let has_ending = word.rsplit('/').next().is_some_and(|name| name.contains('.'));
    !is_foreign && (word.contains('/') && has_ending || TEXTS.iter().any(|end| word.ends_with(end)))
}

/// Whether a word leads through modules to a test or a function. Paths that begin with a crate are left to rustdoc.
fn is_function(word: &str) -> bool {
    let is_foreign = ["crate::", "super::", "std::", "tokio::", "tonic::", "absurd_"];
    let letters =
        |letter: char| letter.is_ascii_lowercase() || letter.is_ascii_digit() || letter == '_' || letter == ':';
    word.contains("::") && word.chars().all(letters) && !is_foreign.iter().any(|start| word.starts_with(start))
}

/// The texts of the files that a path may name, by its last parts. Of a path with `*` only the part before it counts.
fn find<'a>(files: &'a Files, word: &str) -> Vec<&'a str> {
    let is_bare = !word.contains('/') && word.ends_with(".sql");
    // Without a number and a folder it is a statement.
    let is_statement = is_bare && word.starts_with(|letter: char| letter.is_ascii_lowercase());
    let word = if is_statement { format!("server/sql/queries/{word}") } else { word.to_owned() };
    let end = format!("/{word}");
    let is_named = |path: &str| match word.split_once('*') {
        Some((start, _)) => path.starts_with(start),
        None => path == word || path.ends_with(&end),
    };
    files.iter().filter(|(path, _)| is_named(path)).map(|(_, text)| text.as_str()).collect()
}

/// Whether one of these texts defines a function, by itself or by a line of a macro.
fn define(texts: &[&str], name: &str) -> bool {
    let forms = [format!("fn {name}("), format!("fn {name}<"), format!("\n    {name} = ")];
    texts.iter().any(|text| forms.iter().any(|form| text.contains(form.as_str())))
}

/// The problem of a word in backquotes that names a thing that does not exist. `last` holds the texts of the file that
/// was named last; a word that begins with `fn` names a function of that file.
fn problem<'a>(files: &'a Files, word: &str, last: &mut Vec<&'a str>) -> Option<&'static str> {
    if is_path(word) {
        *last = find(files, word);
        return last.is_empty().then_some("no such file or statement");
    }
    if let Some(name) = word.strip_prefix("fn ") {
        return (!define(last, name)).then_some("no such function in the file named before it");
    }
    let (module, name) = word.rsplit_once("::").filter(|_| is_function(word))?;
    let texts = find(files, &format!("{}.rs", module.replace("::", "/")));
    (!define(&texts, name)).then_some("no such test or function")
}

/// The first line of code that names a crate, or a crate of its family: `tonic` stands for `tonic_health` too.
fn first_use(text: &str, name: &str) -> Option<usize> {
    let is_named = |word: &str| word.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('_'));
    let names_it = |line: &str| {
        let code = line.split("//").next().unwrap_or_default();
        code.split(|letter: char| !letter.is_alphanumeric() && letter != '_').any(is_named)
    };
    text.lines().position(names_it).map(|index| index + 1)
}

#[test]
fn everything_that_is_named_exists() {
    let files = tree();
    let mut problems = Vec::new();
    for (path, text) in &files {
        let mut last = Vec::new();
        for (line, word) in quoted(path, text) {
            if let Some(problem) = problem(&files, word, &mut last) {
                problems.push(format!("{path}:{line}: `{word}`: {problem}"));
            }
        }
    }
    for path in LISTS {
        let names = listed(&files[path]);
        assert!(!names.is_empty(), "{path} has no list");
        for (line, name) in names {
            if !files.contains_key(&format!("server/sql/queries/{name}.sql")) {
                problems.push(format!("{path}:{line}: {name:?}: no such statement"));
            }
        }
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

#[test]
fn no_layer_names_a_crate_of_another() {
    let files = tree();
    let (mut found, mut problems) = (Vec::new(), Vec::new());
    for (path, text) in files.iter().filter(|(path, _)| path.starts_with("server/src/") && path.ends_with(".rs")) {
        if let Some(line) = first_use(text, "tokio").filter(|_| PURE.iter().any(|pure| path.starts_with(pure))) {
            problems.push(format!("{path}:{line} names tokio, but does no I/O"));
        }
        for (name, owner) in OWNERS {
            let line = first_use(text, name).filter(|_| !path.starts_with(owner));
            found.extend(line.map(|line| (path.as_str(), name, line)));
        }
    }
    for (path, name, line) in &found {
        if !EXCEPTIONS.iter().any(|(file, of, _)| file == path && of == name) {
            problems.push(format!("{path}:{line} names {name}, which belongs to another layer"));
        }
    }
    for (file, of, reason) in EXCEPTIONS {
        if !found.iter().any(|(path, name, _)| path == file && name == of) {
            problems.push(format!("{file} ({reason}) no longer names {of}: delete its exception"));
        }
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

#[test]
fn a_false_name_is_noticed() {
    let files = Files::from([("server/src/a.rs".to_owned(), "pub fn go() {}\n    made = go;".to_owned())]);
    let mut last = Vec::new();
    for (word, is_true) in [
        ("server/src/a.rs", true),
        ("fn go", true),
        ("fn gone", false),
        ("server/*.rs", true),
        ("a::made", true),
        ("a::gone", false),
        ("b.rs", false),
        ("run_gone.sql", false),
        ("docs/*.md", false),
        ("http://127.0.0.1", true),
    ] {
        assert_eq!(problem(&files, word, &mut last).is_none(), is_true, "{word}");
    }
    assert_eq!(quoted("a.sql", "select `x`\n-- `b.sql` and `c`"), [(2, "b.sql"), (2, "c")]);
    assert_eq!(listed("const A: &[&str] = &[\n    \"b\",\n];\n\"c\""), [(2, "b")]);
    assert_eq!(first_use("// tonic\nmonotonic();\nuse tonic_health::pb;", "tonic"), Some(3));
}
