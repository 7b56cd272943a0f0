//! How often each part is measured.

use std::str::FromStr;

use anyhow::Result;
use clap::ValueEnum;

use crate::cluster::Part;

/// Runs when nothing else is said.
const RUNS: usize = 5;
/// Runs of those that take long for what they say.
const LONG: [(Part, usize); 2] = [(Part::Large, 1), (Part::RivalStories, 2)];
const RUNS_MAX: usize = 99;

/// A number of runs, of one part or of all whose number is not given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Given(Option<Part>, usize);

impl FromStr for Given {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let (part, number) = match text.split_once('=') {
            Some((part, number)) => (Some(Part::from_str(part, false)?), number),
            None => (None, text),
        };
        match number.parse() {
            Ok(number) if (1..=RUNS_MAX).contains(&number) => Ok(Self(part, number)),
            _ => Err(format!("\"{number}\" is not a number from 1 to {RUNS_MAX}")),
        }
    }
}

/// Runs of each part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Runs(Vec<Given>);

impl Runs {
    /// As given.
    pub fn new(given: &[Given]) -> Self {
        Self(given.to_vec())
    }

    /// Of a part.
    pub fn of(&self, part: Part) -> usize {
        let given = |of: Option<Part>| {
            let found = self.0.iter().rev().find(|given| given.0 == of);
            found.map(|given| given.1)
        };
        let usual = || LONG.iter().find(|long| long.0 == part).map(|long| long.1);
        given(Some(part))
            .or_else(|| given(None))
            .or_else(usual)
            .unwrap_or(RUNS)
    }

    /// Of what is no part.
    pub fn of_others(&self) -> usize {
        let found = self.0.iter().rev().find(|given| given.0.is_none());
        found.map_or(RUNS, |given| given.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(given: &[&str]) -> Runs {
        let given = given
            .iter()
            .map(|text| text.parse().expect("a number of runs"));
        Runs(given.collect())
    }

    #[test]
    fn a_part_has_its_own_number_of_runs_else_that_of_all_else_the_usual_one() {
        let usual = runs(&[]);
        assert_eq!((usual.of(Part::Create), usual.of_others()), (5, 5));
        assert_eq!(
            (usual.of(Part::Large), usual.of(Part::RivalStories)),
            (1, 2)
        );
        let all = runs(&["3"]);
        assert_eq!((all.of(Part::Large), all.of_others()), (3, 3));
        let one = runs(&["3", "large=2"]);
        assert_eq!((one.of(Part::Large), one.of(Part::Create)), (2, 3));
        assert_eq!(runs(&["rival-stories=4"]).of(Part::RivalStories), 4);
        for wrong in ["0", "100", "x", "other=1", "large=", "large=0"] {
            assert!(wrong.parse::<Given>().is_err(), "{wrong}");
        }
    }
}
