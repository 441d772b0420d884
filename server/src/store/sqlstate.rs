//! The meaning of every SQLSTATE of Postgres. A test covers all codes that Postgres 14 to 18 can raise, so none gets
//! its meaning by accident.

/// Meaning of a SQLSTATE for the statement that it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Meaning {
    /// The statement contains a value that Postgres cannot store.
    Value,
    /// A rule of the database's owner refuses a row: a trigger, a constraint, a policy.
    Refused,
    /// A unique key exists already.
    Key,
    /// A function of the storage contract raised it for its caller.
    Contract,
    /// The server's role lacks a right.
    Rights,
    /// A table is missing: a queue's, or one of the schemas'.
    Table,
    /// A table, a function or a type does not match the server's expectations.
    Structure,
    /// Stored pages or rows cannot be read.
    Storage,
    /// Something outside the tables is broken: a library, a file, a setting.
    Installation,
    /// A lock was not granted in time.
    Lock,
    /// A conflict with another transaction. Run the statement again.
    Conflict,
    /// The statement exceeded its time limit, or was cancelled.
    Cancelled,
    /// Postgres lacks memory or another resource at the moment.
    Resources,
    /// Postgres accepts no further connection.
    Connections,
    /// The disk is full.
    Disk,
    /// The database takes no writes.
    ReadOnly,
    /// The session ends, and its transaction is rolled back.
    Session,
    /// The connection failed. The statement may have been carried out.
    Connection,
    /// A prepared statement is gone, or belongs to another session.
    Prepared,
    /// The statement itself is wrong.
    Bug,
}

/// Meanings by class, the first two characters of a code.
const CLASSES: &[(&str, Meaning)] = &[
    ("00", Meaning::Refused),
    ("01", Meaning::Refused),
    ("02", Meaning::Refused),
    ("03", Meaning::Bug),
    ("08", Meaning::Connection),
    ("09", Meaning::Refused),
    // `fault` singles out stale plans, and values that the encoding lacks.
    ("0A", Meaning::Refused),
    ("0B", Meaning::Bug),
    ("0F", Meaning::Bug),
    ("0L", Meaning::Rights),
    ("0P", Meaning::Rights),
    // Postgres 18 lists this class as 10.
    ("10", Meaning::Refused),
    ("0Z", Meaning::Refused),
    ("20", Meaning::Refused),
    ("21", Meaning::Bug),
    ("22", Meaning::Value),
    ("23", Meaning::Refused),
    ("24", Meaning::Bug),
    ("25", Meaning::Bug),
    ("26", Meaning::Prepared),
    ("27", Meaning::Refused),
    ("28", Meaning::Session),
    ("2B", Meaning::Refused),
    ("2D", Meaning::Bug),
    ("2F", Meaning::Refused),
    ("34", Meaning::Bug),
    ("38", Meaning::Refused),
    ("39", Meaning::Refused),
    ("3B", Meaning::Bug),
    ("3D", Meaning::Session),
    ("3F", Meaning::Table),
    ("40", Meaning::Conflict),
    // A test prepares all statements, so a missing name means that it was renamed or dropped later.
    ("42", Meaning::Structure),
    ("44", Meaning::Refused),
    ("53", Meaning::Resources),
    ("54", Meaning::Value),
    ("55", Meaning::Structure),
    ("57", Meaning::Session),
    ("58", Meaning::Installation),
    ("72", Meaning::Conflict),
    ("F0", Meaning::Installation),
    ("HV", Meaning::Refused),
    ("P0", Meaning::Refused),
    ("XX", Meaning::Storage),
];

/// Codes whose meaning differs from that of their class.
const CODES: &[(&str, Meaning)] = &[
    ("23505", Meaning::Key),
    ("25006", Meaning::ReadOnly),
    // The transaction was open for too long.
    ("25P03", Meaning::Session),
    ("25P04", Meaning::Session),
    ("40002", Meaning::Refused),
    ("40003", Meaning::Connection),
    ("42501", Meaning::Rights),
    ("42601", Meaning::Bug),
    ("42P01", Meaning::Table),
    ("42P02", Meaning::Bug),
    ("42P03", Meaning::Bug),
    // A pooler assigned the session of another client.
    ("42P05", Meaning::Prepared),
    ("42P08", Meaning::Bug),
    ("42P14", Meaning::Bug),
    ("42P18", Meaning::Bug),
    ("53100", Meaning::Disk),
    ("53300", Meaning::Connections),
    // Another statement uses the object; treated like a lock that is not granted.
    ("55006", Meaning::Lock),
    ("55P02", Meaning::Bug),
    ("55P03", Meaning::Lock),
    ("55P04", Meaning::Bug),
    ("57014", Meaning::Cancelled),
    ("P0001", Meaning::Contract),
    ("AB001", Meaning::Contract),
    ("AB002", Meaning::Contract),
    ("AB003", Meaning::Contract),
];

/// The meaning of a code. Classes unknown to every release of Postgres are raised by the database's owner.
pub(super) fn meaning(code: &str) -> Meaning {
    let of_code = CODES.iter().find(|(known, _)| *known == code);
    let of_class = || CLASSES.iter().find(|(class, _)| code.get(..2) == Some(*class));
    of_code.or_else(of_class).map_or(Meaning::Refused, |(_, meaning)| *meaning)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use super::*;

    /// Every code that Postgres 14 to 18 can raise.
    const KNOWN: &str = include_str!("sqlstates.txt");

    fn known() -> BTreeSet<&'static str> {
        KNOWN.lines().filter(|line| !line.starts_with('#')).flat_map(str::split_whitespace).collect()
    }

    #[test]
    fn every_class_of_postgres_has_a_meaning_and_every_line_a_code() {
        let known = known();
        let classes: BTreeSet<&str> = known.iter().map(|code| &code[..2]).collect();
        let listed: BTreeSet<&str> = CLASSES.iter().map(|(class, _)| *class).collect();
        assert_eq!(classes, listed);
        assert_eq!(listed.len(), CLASSES.len(), "a class has two lines");
        for (code, its) in CODES {
            assert!(known.contains(code) || *its == Meaning::Contract, "Postgres knows no {code}");
            let class = CLASSES.iter().find(|(class, _)| code.starts_with(class));
            assert_ne!(class.map(|(_, meaning)| meaning), Some(its), "{code} says what its class says");
        }
    }

    #[test]
    fn codes_of_the_installed_releases_are_known() {
        let known = known();
        for release in 14..=18 {
            let path = format!("/usr/share/postgresql/{release}/errcodes.txt");
            let Ok(text) = std::fs::read_to_string(Path::new(&path)) else { continue };
            for line in text.lines().filter(|line| !line.starts_with(['#', 'S'])) {
                let Some(code) = line.split_whitespace().next() else { continue };
                assert!(known.contains(code), "{path}: {code}");
            }
        }
    }

    #[test]
    fn a_code_outside_of_postgres_is_a_refusal_by_the_owner() {
        assert_eq!(meaning("MY001"), Meaning::Refused);
        assert_eq!(meaning("ZZ"), Meaning::Refused);
        assert_eq!(meaning(""), Meaning::Refused);
    }

    #[test]
    fn what_lasts_is_never_taken_for_something_that_passes() {
        let passing = |meaning: Meaning| {
            matches!(
                meaning,
                Meaning::Lock
                    | Meaning::Conflict
                    | Meaning::Cancelled
                    | Meaning::Resources
                    | Meaning::Connections
                    | Meaning::Disk
                    | Meaning::ReadOnly
                    | Meaning::Session
                    | Meaning::Connection
                    | Meaning::Prepared
            )
        };
        let known = known();
        let found: Vec<&&str> = known.iter().filter(|code| passing(meaning(code))).collect();
        let expected = "08000 08001 08003 08004 08006 08007 08P01 25006 25P03 25P04 26000 28000 28P01 3D000 40000 40001 \
                        40003 40P01 42P05 53000 53100 53200 53300 53400 55006 55P03 57000 57014 57P01 57P02 57P03 57P04 \
                        57P05 72000";
        assert_eq!(found, expected.split_whitespace().collect::<Vec<_>>().iter().collect::<Vec<_>>());
    }
}
