//! `docs/reference.md`: the comments of the proto files, rendered. `ABSURD_TEST_UPDATE=1` writes it anew.

use std::fmt::Write as _;

use absurd_tests::root;
use prost_reflect::{
    Cardinality, DescriptorPool, EnumDescriptor, FieldDescriptor, FileDescriptor, Kind, MessageDescriptor,
};

/// The comment at a place of a file.
fn comment(file: &FileDescriptor, path: &[i32]) -> String {
    let locations = file.file_descriptor_proto().source_code_info.iter().flat_map(|info| &info.location);
    let text =
        locations.filter(|location| location.path == path).find_map(|location| location.leading_comments.clone());
    let text = text.unwrap_or_else(|| panic!("{}: no comment at {path:?}", file.name()));
    text.lines().map(|line| line.strip_prefix(' ').unwrap_or(line)).collect::<Vec<_>>().join("\n").trim().to_owned()
}

/// As one paragraph, safe inside a table.
fn flat(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|").replace('<', "&lt;")
}

fn anchor(name: &str) -> String {
    format!("[{name}](#{})", name.to_lowercase())
}

fn kind(field: &FieldDescriptor) -> String {
    let own = |name: &str, package: &str| match package {
        "absurd.v1" => anchor(name),
        _ => name.to_owned(),
    };
    let name = match field.kind() {
        Kind::Message(message) => own(message.name(), message.package_name()),
        Kind::Enum(values) => own(values.name(), values.package_name()),
        other => format!("{other:?}").to_lowercase(),
    };
    match field.cardinality() {
        Cardinality::Repeated => format!("repeated {name}"),
        _ if field.field_descriptor_proto().proto3_optional() => format!("optional {name}"),
        _ => name,
    }
}

fn message(out: &mut String, message: &MessageDescriptor) {
    let file = message.parent_file();
    let _ = writeln!(out, "### {}\n\n{}\n", message.name(), flat(&comment(&file, message.path())));
    if message.fields().len() == 0 {
        return;
    }
    out.push_str("| field | type | |\n|---|---|---|\n");
    for field in message.fields() {
        let one_of = field.containing_oneof().filter(|_| !field.field_descriptor_proto().proto3_optional());
        let choice = one_of.map(|one| format!("One of `{}`. ", one.name())).unwrap_or_default();
        let text = flat(&comment(&file, field.path()));
        let _ = writeln!(out, "| `{}` = {} | {} | {choice}{text} |", field.name(), field.number(), kind(&field));
    }
    out.push('\n');
}

fn values(out: &mut String, values: &EnumDescriptor) {
    let file = values.parent_file();
    let _ = writeln!(out, "### {}\n\n{}\n", values.name(), flat(&comment(&file, values.path())));
    out.push_str("| value | |\n|---|---|\n");
    for value in values.values() {
        let text = flat(&comment(&file, value.path()));
        let _ = writeln!(out, "| `{}` = {} | {text} |", value.name(), value.number());
    }
    out.push('\n');
}

fn rendered() -> String {
    let pool = DescriptorPool::decode(absurd_proto::FILE_DESCRIPTOR_SET).unwrap();
    let mut out = String::from(
        "# Reference\n\nThe comments of [the proto files](../proto/absurd/v1), rendered; do not edit. `ABSURD_TEST_UPDATE=1 cargo test \
         -p absurd-tests --test it reference::` writes it anew.\n\n",
    );
    for service in ["AbsurdService", "TestClockService"] {
        let service = pool.get_service_by_name(&format!("absurd.v1.{service}")).unwrap();
        let file = service.parent_file();
        let about = comment(&file, service.path()).replace("\n  ", "\n      ");
        let _ = writeln!(out, "## {}\n\n{about}\n", service.name());
        for method in service.methods() {
            let stream = if method.is_server_streaming() { "stream of " } else { "" };
            let (input, output) = (anchor(method.input().name()), anchor(method.output().name()));
            let text = flat(&comment(&file, method.path()));
            let _ = writeln!(out, "### {}\n\n{input} → {stream}{output}\n\n{text}\n", method.name());
        }
    }
    out.push_str("## Messages\n\n");
    let ours = || pool.files().filter(|file| file.package_name() == "absurd.v1");
    for file in ours() {
        file.messages().for_each(|each| message(&mut out, &each));
    }
    out.push_str("## Enums\n\n");
    for file in ours() {
        file.enums().for_each(|each| values(&mut out, &each));
    }
    out.truncate(out.trim_end().len());
    out.push('\n');
    out
}

#[test]
fn the_reference_is_what_the_proto_files_say() {
    let path = root().join("docs/reference.md");
    let rendered = rendered();
    if std::env::var_os("ABSURD_TEST_UPDATE").is_some() {
        std::fs::write(&path, &rendered).unwrap();
    }
    let written = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(written == rendered, "docs/reference.md is not up to date; ABSURD_TEST_UPDATE=1 writes it anew");
}
