//! Configuration: a file of any content, and a database's URL, end in options or in an error that shows no password.
#![no_main]

use absurd_server::settings::{Secret, Settings, Span, parse_database};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let _ = text.parse::<Span>();
    if let Err(error) = parse_database(&Secret::from(text)) {
        assert!(!format!("{error:#}").contains("hunter2"), "it repeats what may be a password: {error:#}");
    }
    let Ok(settings) = toml::from_str::<Settings>(text) else { return };
    let both = settings.clone().or(Settings::default());
    assert_eq!(format!("{both:?}"), format!("{settings:?}"), "nothing joined is nothing changed");
    let url = Settings { database_url: Some(Secret::from("postgresql://me@nowhere/db")), ..Settings::default() };
    if let Ok(options) = settings.or(url).into_app_options() {
        assert!(options.connections_max >= 2);
        assert!((1..=100).contains(&options.limits.json_depth_max));
        assert!((1..=1000).contains(&options.limits.batch_max));
    }
});
