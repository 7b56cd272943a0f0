//! Every reason a condition can have is explained to the people who will read it.

use operator_api::condition::{ConditionType, Reason};

#[test]
fn every_condition_and_reason_is_in_the_troubleshooting_guide() {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../docs/guide/troubleshooting.md"
    );
    let page = std::fs::read_to_string(path).expect("the guide is there");
    let missing: Vec<&str> = Reason::ALL
        .iter()
        .map(|reason| reason.as_str())
        .filter(|reason| !page.contains(&format!("`{reason}`")))
        .chain(
            ConditionType::ALL
                .iter()
                .map(|kind| kind.as_str())
                .filter(|kind| !page.contains(kind)),
        )
        .collect();
    assert!(missing.is_empty(), "not explained: {}", missing.join(", "));
}
