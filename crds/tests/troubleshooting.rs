//! Every reason that a condition or an event can have is explained to the people who will read it.

use operator_api::condition::{ConditionType, EventReason, Reason};

#[test]
fn every_condition_and_every_reason_of_conditions_and_events_is_in_the_troubleshooting_guide() {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../docs/guide/troubleshooting.md"
    );
    let page = std::fs::read_to_string(path).expect("the guide is there");
    let missing: Vec<&str> = Reason::ALL
        .iter()
        .map(|reason| reason.as_str())
        .chain(EventReason::ALL.iter().map(|reason| reason.as_str()))
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

/// One word says one thing: what an event tells alone is no condition's reason with another meaning.
#[test]
fn a_reason_of_an_event_alone_is_no_reason_of_a_condition() {
    let both: Vec<&str> = EventReason::ALL
        .iter()
        .map(|reason| reason.as_str())
        .filter(|reason| Reason::parse(reason).is_some())
        .collect();
    assert!(both.is_empty(), "{}", both.join(", "));
}
