//! Which mutant is on. Part of the copy of the tree in which all mutants are; see `tests/mutants`.

static CHOSEN: std::sync::LazyLock<Option<String>> = std::sync::LazyLock::new(|| std::env::var("ABSURD_MUTANT").ok());

/// Name, the text of its file, and that text with the change.
static SQL: &[(&str, &str, &str)] = &[
/* SQL */
];

/// Whether a mutant is on.
pub fn on(name: &str) -> bool {
    CHOSEN.as_deref() == Some(name)
}

/// SQL as the mutant has it that is on.
pub fn text(sql: &str) -> String {
    match SQL.iter().find(|(name, _, _)| on(name)) {
        Some((_, before, after)) => sql.replace(before, after),
        None => sql.to_owned(),
    }
}
