//! Where random inputs come from.

use std::process::Command;

use crate::harness::{driver, on_every_schedule};

/// Set where the test below runs itself, to fail.
const FAILING: &str = "KERNELS_SEEDS_FAIL";

#[test]
fn inputs_are_fresh_and_a_failure_says_how_to_repeat_them() {
    const NAME: &str = "seeds::inputs_are_fresh_and_a_failure_says_how_to_repeat_them";
    if std::env::var_os(FAILING).is_some() {
        on_every_schedule("harness", |lab| panic!("drew {}", lab.random.next()));
        return;
    }
    if driver().is_none() {
        return;
    }
    let failing = |seed: Option<&str>| {
        let mut command = Command::new(std::env::current_exe().expect("this test"));
        command.args(["--exact", NAME]).env(FAILING, "1");
        match seed {
            Some(seed) => command.env("KERNELS_SEED", seed),
            None => command.env_remove("KERNELS_SEED"),
        };
        let output = command.output().expect("this test runs");
        assert!(!output.status.success());
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let after = |words: &str| {
            let rest = said.split_once(words).map(|(_, rest)| rest);
            let word = rest.and_then(|rest| rest.split_whitespace().next());
            word.unwrap_or_else(|| panic!("no {words} in {said}"))
                .to_owned()
        };
        assert!(said.contains(&format!("--exact {NAME}")), "{said}");
        (after("KERNELS_SEED="), after("drew "))
    };
    let (first, second) = (failing(None), failing(None));
    assert!(first.0 != second.0 && first.1 != second.1, "{first:?}");
    assert_eq!(failing(Some(&first.0)), first);
}
