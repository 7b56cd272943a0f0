//! A Kubernetes quantity as users write it (`80Gi`, `500m`, `4`), kept as text.

use std::borrow::Cow;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, de};

/// Text of a quantity; numbers are accepted and kept as their decimal text.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct Quantity(pub String);

impl Quantity {
    /// The value rounded up to whole units (bytes for memory), or `None` when the text is no
    /// quantity or is negative.
    pub fn value(&self) -> Option<u64> {
        let millis = self.millis()?;
        u64::try_from(millis.div_ceil(1000)).ok()
    }

    /// The value in thousandths (millicores for cpu), or `None` when the text is no quantity or
    /// is negative.
    pub fn millis(&self) -> Option<u128> {
        parse_millis(&self.0)
    }
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<&str> for Quantity {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

/// Reads a Kubernetes quantity into thousandths; shared with readers of node and pod resources.
pub fn parse_millis(text: &str) -> Option<u128> {
    let text = text.trim();
    let digits_end = text
        .find(|c: char| !(c.is_ascii_digit() || c == '.'))
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits_end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() || fraction.len() > 18 || whole.len() > 20 {
        return None;
    }
    let whole: u128 = if whole.is_empty() {
        0
    } else {
        whole.parse().ok()?
    };
    let scale = 10u128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let fraction: u128 = if fraction.is_empty() {
        0
    } else {
        fraction.parse().ok()?
    };
    let scaled = whole.checked_mul(scale)?.checked_add(fraction)?;
    let (multiplier, divisor) = multiplier_millis(suffix)?;
    Some(
        scaled
            .checked_mul(multiplier)?
            .div_ceil(scale.checked_mul(divisor)?),
    )
}

/// `suffix` as (multiplier, divisor) towards thousandths.
fn multiplier_millis(suffix: &str) -> Option<(u128, u128)> {
    let binary = |power: u32| Some((1000 * 1024u128.pow(power), 1));
    let decimal = |power: u32| Some((1000 * 1000u128.pow(power), 1));
    match suffix {
        "" => Some((1000, 1)),
        "n" => Some((1, 1_000_000)),
        "u" => Some((1, 1000)),
        "m" => Some((1, 1)),
        "k" => decimal(1),
        "M" => decimal(2),
        "G" => decimal(3),
        "T" => decimal(4),
        "P" => decimal(5),
        "Ki" => binary(1),
        "Mi" => binary(2),
        "Gi" => binary(3),
        "Ti" => binary(4),
        "Pi" => binary(5),
        exponent if exponent.starts_with(['e', 'E']) => {
            let power: u32 = exponent[1..].parse().ok()?;
            Some((1000u128.checked_mul(10u128.checked_pow(power)?)?, 1))
        }
        _ => None,
    }
}

impl<'de> Deserialize<'de> for Quantity {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Quantity;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a quantity such as \"80Gi\", \"500m\" or 4")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Quantity, E> {
                Ok(Quantity(text.to_owned()))
            }
            fn visit_u64<E: de::Error>(self, number: u64) -> Result<Quantity, E> {
                Ok(Quantity(number.to_string()))
            }
            fn visit_i64<E: de::Error>(self, number: i64) -> Result<Quantity, E> {
                Ok(Quantity(number.to_string()))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

impl JsonSchema for Quantity {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Quantity".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "x-kubernetes-int-or-string": true,
            "maxLength": 32,
            "pattern": "^[0-9]+(\\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_read_as_kubernetes_reads_them() {
        for (text, millis) in [
            ("4", Some(4000)),
            ("500m", Some(500)),
            ("1.5", Some(1500)),
            ("80Gi", Some(80 * 1024 * 1024 * 1024 * 1000)),
            ("1k", Some(1_000_000)),
            ("0.5Gi", Some(512 * 1024 * 1024 * 1000)),
            ("1e3", Some(1_000_000)),
            ("100n", Some(1)),
            ("", None),
            ("-4", None),
            ("4 Gi", None),
            ("Gi", None),
            ("9e99", None),
        ] {
            assert_eq!(parse_millis(text), millis, "{text}");
        }
    }

    #[test]
    fn numbers_are_accepted_as_users_write_them() {
        let quantity: Quantity = serde_json::from_str("4").unwrap();
        assert_eq!(quantity, Quantity::from("4"));
        assert_eq!(Quantity::from("1500m").value(), Some(2));
    }
}
