//! Parts of GPUs: MIG profiles, the devices a node offers of them, and how they are counted.
//!
//! A MIG device is a device of its own: it has its memory, and nothing connects it with another one,
//! so that a replica on MIG devices is always one device. Under the strategy `single` the device
//! plugin counts them as `nvidia.com/gpu`, under `mixed` as `nvidia.com/mig-<profile>` beside the whole
//! GPUs of the same node; the surprise is that the same profile is therefore two kinds of device.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::fit::DeviceKind;
use crate::pairs::Pairs;
use crate::snapshot::NodeView;

/// What the names of resources and labels of MIG devices begin with.
const PREFIX: &str = "nvidia.com/mig-";
/// Kinds of MIG device counted apart on one node. A GPU can be divided into seven parts, so that more
/// kinds are no layout that a device plugin reports.
const KINDS_MAX: usize = 8;

/// What a profile has beyond memory and compute, as its name ends.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
enum Extra {
    /// Nothing.
    #[default]
    None,
    /// Media engines.
    Media,
    /// All media engines.
    MediaAll,
    /// Graphics.
    Graphics,
    /// Media engines left out.
    NoMedia,
}

impl Extra {
    const ALL: [(Self, &'static str); 5] = [
        (Self::None, ""),
        (Self::Media, ".me"),
        (Self::MediaAll, ".me.all"),
        (Self::Graphics, ".gfx"),
        (Self::NoMedia, "-me"),
    ];
}

/// A MIG profile such as `3g.71gb`: compute slices and gigabytes, as NVIDIA names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MigProfile {
    memory_gb: u16,
    compute: u8,
    extra: Extra,
}

/// A text that is no MIG profile.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "must be a MIG profile as the resource nvidia.com/mig-<profile> names it, such as 3g.71gb or 1g.10gb.me"
)]
pub struct NoProfile;

impl FromStr for MigProfile {
    type Err = NoProfile;

    fn from_str(text: &str) -> Result<Self, NoProfile> {
        let parse = || {
            let (compute, rest) = text.split_once("g.")?;
            let (memory, extra) = rest.split_once("gb")?;
            let is_number = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
            let is_plain = is_number(compute) && is_number(memory) && !memory.starts_with('0');
            let (extra, _) = Extra::ALL.into_iter().find(|(_, word)| *word == extra)?;
            let profile = Self {
                memory_gb: memory.parse().ok()?,
                compute: compute.parse().ok()?,
                extra,
            };
            (is_plain && (1..=9).contains(&profile.compute) && profile.memory_gb <= 9999)
                .then_some(profile)
        };
        parse().ok_or(NoProfile)
    }
}

impl TryFrom<String> for MigProfile {
    type Error = NoProfile;

    fn try_from(text: String) -> Result<Self, NoProfile> {
        text.parse()
    }
}

impl From<MigProfile> for String {
    fn from(profile: MigProfile) -> Self {
        profile.to_string()
    }
}

impl fmt::Display for MigProfile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let extra = Extra::ALL.into_iter().find(|(kind, _)| *kind == self.extra);
        let Self {
            memory_gb, compute, ..
        } = self;
        let word = extra.map_or("", |(_, word)| word);
        write!(f, "{compute}g.{memory_gb}gb{word}")
    }
}

impl MigProfile {
    /// The extended resource of the strategy `mixed`.
    pub fn resource(self) -> String {
        format!("{PREFIX}{self}")
    }

    /// The profile whose extended resource this is.
    pub fn of_resource(name: &str) -> Option<Self> {
        name.strip_prefix(PREFIX)?.parse().ok()
    }

    /// The profile in a product's name: `NVIDIA-H200-MIG-3g.71gb`.
    pub fn of_product(product: &str) -> Option<Self> {
        product.split_once("-MIG-")?.1.parse().ok()
    }
}

/// How the device plugin counts MIG devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum MigStrategy {
    /// As `nvidia.com/gpu`: all GPUs of a node are divided alike.
    Single,
    /// As `nvidia.com/mig-<profile>`.
    Mixed,
}

/// MIG devices by profile, counted as resources of the strategy `mixed`.
///
/// In order of profile and without zeros, so that equal amounts are equal values. What does not fit
/// into the table makes the amount uncountable: such devices are not given away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MigDevices {
    entries: [Option<(MigProfile, u16)>; KINDS_MAX],
    is_uncountable: bool,
}

impl MigDevices {
    /// One kind.
    pub fn of(profile: MigProfile, count: u64) -> Self {
        let mut devices = Self::default();
        devices.set(profile, count);
        devices
    }

    /// How many of a profile.
    pub fn get(&self, profile: MigProfile) -> u64 {
        self.iter()
            .find(|(kind, _)| *kind == profile)
            .map_or(0, |(_, count)| count)
    }

    /// All kinds that there are any of.
    pub fn iter(&self) -> impl Iterator<Item = (MigProfile, u64)> + '_ {
        let entries = self.entries.iter().flatten();
        entries.map(|(profile, count)| (*profile, u64::from(*count)))
    }

    /// Devices of all kinds.
    pub fn total(&self) -> u64 {
        self.iter().map(|(_, count)| count).sum()
    }

    /// Whether no more is asked for than `free` has.
    pub fn fit_in(&self, free: &Self) -> bool {
        !self.is_uncountable
            && self
                .iter()
                .all(|(profile, count)| count <= free.get(profile))
    }

    /// Sets how many of a profile there are.
    pub fn set(&mut self, profile: MigProfile, count: u64) {
        let count = u16::try_from(count).unwrap_or(u16::MAX);
        let mut there: Vec<_> = self.entries.iter().flatten().copied().collect();
        there.retain(|(kind, _)| *kind != profile);
        if count > 0 {
            there.push((profile, count));
        }
        there.sort_unstable();
        if there.len() > KINDS_MAX {
            self.is_uncountable = true;
            there.truncate(KINDS_MAX);
        }
        self.entries = [None; KINDS_MAX];
        for (entry, one) in self.entries.iter_mut().zip(there) {
            *entry = Some(one);
        }
    }

    fn merged(self, other: Self, join: impl Fn(u64, u64) -> u64) -> Self {
        let is_uncountable = self.is_uncountable || other.is_uncountable;
        let mut merged = self;
        for (profile, count) in other.iter() {
            merged.set(profile, join(self.get(profile), count));
        }
        merged.is_uncountable |= is_uncountable;
        merged
    }

    /// The sum.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        if other == Self::default() {
            return self;
        }
        self.merged(other, u64::saturating_add)
    }

    /// The larger of each.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        self.merged(other, u64::max)
    }

    /// What is left when `used` is gone; nothing when that cannot be counted.
    #[must_use]
    pub fn minus(self, used: Self) -> Self {
        let mut left = self;
        for (profile, count) in self.iter() {
            let taken = if used.is_uncountable {
                count
            } else {
                used.get(profile)
            };
            left.set(profile, count.saturating_sub(taken));
        }
        left
    }
}

/// MIG devices that a node's labels tell of under the strategy `mixed`.
pub fn mixed_kinds(labels: &Pairs) -> Vec<DeviceKind> {
    let label = |key: &str| labels.get(key).unwrap_or_default();
    labels
        .iter()
        .filter(|(key, _)| key.starts_with(PREFIX))
        .filter_map(|(key, value)| {
            let name = key.strip_suffix(".memory")?;
            let profile = MigProfile::of_resource(name)?;
            let about = |what: &str| label(&format!("{name}.{what}"));
            let is_shared = !matches!(about("sharing-strategy"), "" | "none")
                || about("product").ends_with("-SHARED");
            if is_shared {
                return None;
            }
            let product = match about("product") {
                "" => format!("{}-MIG-{profile}", label("nvidia.com/gpu.product")),
                given => given.to_owned(),
            };
            Some(DeviceKind::Mig {
                product,
                memory_bytes: value.parse::<u64>().ok()?.checked_mul(1 << 20)?,
                profile,
                strategy: MigStrategy::Mixed,
            })
        })
        .collect()
}

/// What a node's GPUs are being divided anew for; its devices may be gone in a moment.
pub fn repartitioning(node: &NodeView) -> Option<&str> {
    let state = node.label("nvidia.com/mig.config.state");
    matches!(state, "pending" | "rebooting").then_some(state)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(text: &str) -> MigProfile {
        text.parse().expect("a profile")
    }

    #[test]
    fn a_profile_is_read_as_it_is_written() {
        for text in [
            "1g.5gb",
            "3g.71gb",
            "7g.141gb",
            "1g.10gb.me",
            "1g.24gb.me.all",
            "2g.48gb.gfx",
            "1g.24gb-me",
        ] {
            assert_eq!(profile(text).to_string(), text);
            let resource = format!("nvidia.com/mig-{text}");
            assert_eq!(profile(text).resource(), resource);
            assert_eq!(MigProfile::of_resource(&resource), Some(profile(text)));
            assert_eq!(
                MigProfile::of_product(&format!("NVIDIA-H200-MIG-{text}")),
                Some(profile(text))
            );
        }
    }

    #[test]
    fn what_is_no_profile_is_refused() {
        for text in [
            "",
            "3g",
            "3g.71",
            "g.71gb",
            "3g.071gb",
            "0g.5gb",
            "3g.71gb+me",
            "3g.71GB",
            "+3g.5gb",
            "10g.5gb",
            "3g.99999gb",
            "3g.gb",
            "1c.3g.20gb",
            "INVALID",
        ] {
            assert_eq!(text.parse::<MigProfile>(), Err(NoProfile), "{text}");
            assert_eq!(
                MigProfile::of_resource(&format!("nvidia.com/mig-{text}")),
                None
            );
        }
    }

    #[test]
    fn devices_are_counted_by_profile() {
        let (small, large) = (profile("1g.18gb"), profile("3g.71gb"));
        let node = MigDevices::of(large, 2).plus(MigDevices::of(small, 1));
        assert_eq!(
            node,
            MigDevices::of(small, 1).plus(MigDevices::of(large, 2))
        );
        assert_eq!((node.get(small), node.get(large), node.total()), (1, 2, 3));
        let left = node.minus(MigDevices::of(large, 2));
        assert_eq!(left, MigDevices::of(small, 1));
        assert!(MigDevices::of(small, 1).fit_in(&left));
        assert!(!MigDevices::of(small, 2).fit_in(&left));
        assert!(!MigDevices::of(large, 1).fit_in(&left));
        assert!(MigDevices::default().fit_in(&MigDevices::default()));
        let more = MigDevices::of(small, 3).max(node);
        assert_eq!((more.get(small), more.get(large)), (3, 2));
    }

    #[test]
    fn what_cannot_be_counted_is_not_given_away() {
        let many = (1..=9).fold(MigDevices::default(), |sum, gigabytes| {
            sum.plus(MigDevices::of(profile(&format!("1g.{gigabytes}gb")), 1))
        });
        assert_eq!(many.total(), 8);
        let first = MigDevices::of(profile("1g.1gb"), 7);
        assert_eq!(first.minus(many), MigDevices::default());
        assert!(!many.fit_in(&many), "nobody knows what it asks for");
        assert!(MigDevices::of(profile("1g.1gb"), 1).fit_in(&many));
    }
}
