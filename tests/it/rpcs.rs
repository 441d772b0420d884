//! Every RPC: it succeeds, it is refused with each reason that its comment lists and with no other, repeating it is what its
//! comment says, and what is refused has written nothing. `cases` is the table.

/// A test in parts, which run side by side, each on a server of its own: `walk(part, parts)` takes one of each `parts`
/// things, from number `part` on. There are as many parts as names, so that nothing falls out.
macro_rules! in_parts {
    ($walk:path => $($name:ident)+) => {
        const PARTS: &[&str] = &[$(stringify!($name)),+];

        $(
            #[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                let part = PARTS.iter().position(|name| *name == stringify!($name)).unwrap();
                Box::pin($walk(part, PARTS.len())).await;
            }
        )+
    };
}

mod abandoned;
mod cases;
mod circumstances;
mod nth;
mod refusals;
mod walk;
mod world;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

use absurd_tests::{in_time, root};
use futures_util::StreamExt as _;
use prost_reflect::{DescriptorPool, DynamicMessage};
use serde_json::{Value as Json, json as j};

use cases::{Again, Case, Expected, cases, filled, merged};
use world::{World, reason};

/// Cases at once.
const WIDTH: usize = 8;

/// What the parts of a test have counted.
struct Sums<const N: usize>(Mutex<(usize, [usize; N])>);

impl<const N: usize> Sums<N> {
    const fn new() -> Self {
        Self(Mutex::new((0, [0; N])))
    }

    /// Adds what one of so many parts has counted; gives the sums to the last one.
    fn add(&self, parts: usize, counts: [usize; N]) -> Option<[usize; N]> {
        let mut all = self.0.lock().unwrap();
        let (ended, sums) = &mut *all;
        *ended += 1;
        sums.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
        (*ended == parts).then_some(*sums)
    }
}

async fn check(world: &World, index: usize, case: &Case) {
    let queue = format!("c{index}");
    let made = world.make(&queue, case.kind).await;
    let request = filled(&case.request, &queue, &made);
    let short: String = request.to_string().chars().take(200).collect();
    let what = format!("{} {} {short}", case.rpc, case.kind);
    let message = DynamicMessage::deserialize(world.methods[case.rpc].input(), request).expect(&what);
    let before = world.fingerprint(&queue).await;
    let first = in_time(&what, world.call(case.rpc, &message)).await;
    match (&case.expected, first) {
        (Expected::Refused(expected), Err(status)) => {
            assert_eq!(reason(&status), *expected, "{what}: {status:?}");
            assert_eq!(world.fingerprint(&queue).await, before, "{what}: refused, and yet written");
            let again = world.call(case.rpc, &message).await.expect_err(&what);
            assert_eq!(reason(&again), *expected, "{what}: said again");
        }
        (Expected::Done(again), Ok(first)) => match (again, in_time(&what, world.call(case.rpc, &message)).await) {
            (Again::Anew, second) => drop(second.expect(&what)),
            (Again::Refused(expected), second) => assert_eq!(reason(&second.expect_err(&what)), *expected, "{what}"),
            (Again::Same, second) => assert_eq!(second.expect(&what), first, "{what}: said again"),
            (Again::But(changes), second) => {
                // What is false or 0 is not on the wire.
                let expected: Json = without_defaults(&merged(&first, changes));
                assert_eq!(second.expect(&what), expected, "{what}: said again");
            }
        },
        (Expected::Done(_), Err(status)) => panic!("{what}: {status:?}"),
        (Expected::Refused(expected), Ok(answer)) => panic!("{what}: not refused with {expected}: {answer}"),
    }
}

fn without_defaults(value: &Json) -> Json {
    let Some(object) = value.as_object() else { return value.clone() };
    let kept = object.iter().filter(|(_, value)| **value != j!(false) && **value != j!(0));
    Json::Object(kept.map(|(name, value)| (name.clone(), without_defaults(value))).collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_rpc_succeeds_is_refused_and_repeated_as_its_comment_says() {
    let world = World::new().await;
    let cases = cases();
    let all = futures_util::stream::iter(cases.iter().enumerate().map(|(index, case)| check(&world, index, case)));
    all.buffer_unordered(WIDTH).collect::<Vec<()>>().await;
}

/// What the comments of the service list, by RPC.
fn documented() -> BTreeMap<String, BTreeSet<String>> {
    let proto = std::fs::read_to_string(root().join("proto/absurd/v1/absurd_service.proto")).unwrap();
    let (_, service) = proto.split_once("service AbsurdService {").unwrap();
    let mut documented = BTreeMap::new();
    let mut comment = String::new();
    for line in service.lines().map(str::trim) {
        if let Some(text) = line.strip_prefix("//") {
            comment.push_str(text);
        } else if let Some(name) = line.strip_prefix("rpc ").and_then(|rest| rest.split('(').next()) {
            let (_, errors) = comment.rsplit_once("Errors:").unwrap_or_else(|| panic!("{name} lists no errors"));
            let names = errors.trim().trim_end_matches('.').split(',').map(|name| name.trim().to_owned());
            documented.insert(name.to_owned(), names.collect());
            comment.clear();
        }
    }
    documented
}

#[test]
fn the_table_has_every_rpc_with_every_reason_of_its_comment() {
    let documented = documented();
    let mut tested: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let mut succeeded = BTreeSet::new();
    for case in cases() {
        let reasons = tested.entry(case.rpc.to_owned()).or_default();
        match case.expected {
            Expected::Refused(reason) => drop(reasons.insert(reason.to_owned())),
            Expected::Done(_) => drop(succeeded.insert(case.rpc.to_owned())),
        }
    }
    // It has a test of its own, for it needs a full server.
    tested.entry("ClaimStream".into()).or_default().insert("STREAM_LIMIT".into());
    assert_eq!(tested, documented);
    assert_eq!(succeeded, documented.keys().cloned().collect());
    let pool = DescriptorPool::decode(absurd_proto::FILE_DESCRIPTOR_SET).unwrap();
    let service = pool.get_service_by_name("absurd.v1.AbsurdService").unwrap();
    assert_eq!(service.methods().len(), documented.len());
}
