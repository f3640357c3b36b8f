//! Values of configuration keys: kinds, ranges, parsing, printing.

use std::fmt;

use crate::device::Wish;

/// A configuration value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// A whole number.
    Whole(u64),
    /// Any finite number.
    Number(f64),
    /// true or false.
    Switch(bool),
    /// Text.
    Text(String),
    /// A list of whole numbers.
    Wholes(Vec<u64>),
    /// A list of numbers.
    Numbers(Vec<f64>),
}

/// What a key takes.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// A whole number from `.0` to `.1`.
    Whole(u64, u64),
    /// A number from `.0` to `.1`.
    Number(f64, f64),
    /// A number above `.0` and up to `.1`.
    Above(f64, f64),
    /// true or false.
    Switch,
    /// Text.
    Text,
    /// A device: `auto`, `cpu`, `cuda` or `cuda:NUMBER`.
    Device,
    /// One of these words.
    Choice(&'static [&'static str]),
    /// `count` whole numbers from `min` to `max`; count 0 takes any number of them but none.
    Wholes {
        /// How many.
        count: usize,
        /// Least of each.
        min: u64,
        /// Most of each.
        max: u64,
    },
    /// `count` numbers above `above` and up to `max`.
    Numbers {
        /// How many.
        count: usize,
        /// Each is above this, or equal to it.
        min: f64,
        /// Most of each.
        max: f64,
    },
}

impl Kind {
    /// Reads what was typed, without TOML's quotes; `None` when it is no such value or out of range.
    pub fn parse(self, text: &str) -> Option<Value> {
        let text = text.trim();
        let items = || text.trim_start_matches('[').trim_end_matches(']').split(',').map(str::trim);
        self.checked(match self {
            Kind::Whole(..) => Value::Whole(text.replace('_', "").parse().ok()?),
            Kind::Number(..) | Kind::Above(..) => Value::Number(text.parse().ok()?),
            Kind::Switch => Value::Switch(text.parse().ok()?),
            Kind::Text | Kind::Choice(_) | Kind::Device => Value::Text(text.into()),
            Kind::Wholes { .. } => Value::Wholes(items().map(|item| item.parse().ok()).collect::<Option<_>>()?),
            Kind::Numbers { .. } => Value::Numbers(items().map(|item| item.parse().ok()).collect::<Option<_>>()?),
        })
    }

    /// Reads a TOML value; `None` as in [`Kind::parse`].
    pub fn read_toml(self, value: &toml::Value) -> Option<Value> {
        let whole = |value: &toml::Value| u64::try_from(value.as_integer()?).ok();
        let number = |value: &toml::Value| value.as_float().or_else(|| value.as_integer().map(|whole| whole as f64));
        self.checked(match self {
            Kind::Whole(..) => Value::Whole(whole(value)?),
            Kind::Number(..) | Kind::Above(..) => Value::Number(number(value)?),
            Kind::Switch => Value::Switch(value.as_bool()?),
            Kind::Text | Kind::Choice(_) | Kind::Device => Value::Text(value.as_str()?.into()),
            Kind::Wholes { .. } => Value::Wholes(value.as_array()?.iter().map(whole).collect::<Option<_>>()?),
            Kind::Numbers { .. } => Value::Numbers(value.as_array()?.iter().map(number).collect::<Option<_>>()?),
        })
    }

    /// The value, if it lies in the range. NaN lies in none.
    fn checked(self, value: Value) -> Option<Value> {
        let fits = match (self, &value) {
            (Kind::Whole(min, max), Value::Whole(value)) => (min..=max).contains(value),
            (Kind::Number(min, max), Value::Number(value)) => (min..=max).contains(value),
            (Kind::Above(min, max), Value::Number(value)) => *value > min && *value <= max,
            (Kind::Choice(words), Value::Text(value)) => words.contains(&value.as_str()),
            (Kind::Device, Value::Text(value)) => Wish::parse(value).is_some(),
            (Kind::Wholes { count, min, max }, Value::Wholes(values)) => {
                (count == 0 && !values.is_empty() || values.len() == count)
                    && values.iter().all(|value| (min..=max).contains(value))
            }
            (Kind::Numbers { count, min, max }, Value::Numbers(values)) => {
                values.len() == count && values.iter().all(|value| (min..=max).contains(value))
            }
            _ => true,
        };
        fits.then_some(value)
    }

    /// What would have been right, for messages and `config init`.
    pub fn expected(self) -> String {
        let whole = |min, max| match max {
            // The largest that TOML can say is no limit.
            _ if max == i64::MAX as u64 => format!("whole number of {min} or more"),
            _ => format!("whole number from {min} to {max}"),
        };
        match self {
            Kind::Whole(min, max) => format!("a {}", whole(min, max)),
            Kind::Number(min, max) => format!("a number from {min} to {max}"),
            Kind::Above(min, max) => format!("a number above {min} and up to {max}"),
            Kind::Switch => "true or false".into(),
            Kind::Text => "text".into(),
            Kind::Device => "auto | cpu | cuda | cuda:NUMBER".into(),
            Kind::Choice(words) => words.join(" | "),
            Kind::Wholes { count: 0, min, max } => format!("a list such as [3, 4], each a {}", whole(min, max)),
            Kind::Wholes { count, min, max } => format!("{count} values, each a {}", whole(min, max)),
            Kind::Numbers { count, min, max } => format!("{count} numbers from {min} to {max}"),
        }
    }
}

impl fmt::Display for Value {
    /// As TOML.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Whole(value) => write!(f, "{value}"),
            // Debug keeps a decimal point, so that it reads as a float, and round-trips.
            Value::Number(value) => write!(f, "{value:?}"),
            Value::Switch(value) => write!(f, "{value}"),
            Value::Text(value) => write!(f, "{}", toml::Value::from(value.as_str())),
            Value::Wholes(values) => write!(f, "{values:?}"),
            Value::Numbers(values) => write!(f, "{values:?}"),
        }
    }
}

impl Value {
    /// As TOML's own type.
    pub fn to_toml(&self) -> toml::Value {
        match self {
            Value::Whole(value) => whole_to_toml(*value),
            Value::Number(value) => (*value).into(),
            Value::Switch(value) => (*value).into(),
            Value::Text(value) => value.as_str().into(),
            Value::Wholes(values) => values.iter().map(|&value| whole_to_toml(value)).collect::<Vec<_>>().into(),
            Value::Numbers(values) => values.clone().into(),
        }
    }

    /// As JSON.
    pub fn as_json(&self) -> serde_json::Value {
        match self {
            Value::Whole(value) => (*value).into(),
            Value::Number(value) => (*value).into(),
            Value::Switch(value) => (*value).into(),
            Value::Text(value) => value.as_str().into(),
            Value::Wholes(values) => values.clone().into(),
            Value::Numbers(values) => values.clone().into(),
        }
    }

    /// Without TOML's quotes, as in help and messages.
    pub fn plain(&self) -> String {
        match self {
            Value::Text(value) => value.clone(),
            other => other.to_string(),
        }
    }
}

fn whole_to_toml(value: u64) -> toml::Value {
    toml::Value::Integer(i64::try_from(value).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_refuse_what_is_outside() {
        let rate = Kind::Above(0.0, 100.0);
        assert_eq!(rate.parse("0.1"), Some(Value::Number(0.1)));
        for wrong in ["0", "-1", "nan", "NaN", "inf", "101", "", "a"] {
            assert_eq!(rate.parse(wrong), None, "{wrong}");
        }
        assert_eq!(Kind::Number(0.0, 1.0).parse("0"), Some(Value::Number(0.0)));
        assert_eq!(Kind::Number(0.0, 1.0).parse("-0.1"), None);
        assert_eq!(Kind::Whole(1, 10).parse("0"), None);
        assert_eq!(Kind::Whole(1, 10).parse("1.5"), None);
        assert_eq!(Kind::Choice(&["cpu", "cuda"]).parse("gpu"), None);
        assert_eq!(Kind::Device.parse("cuda:1"), Some(Value::Text("cuda:1".into())));
        assert_eq!(Kind::Device.parse("gpu"), None);
        let depths = Kind::Wholes { count: 4, min: 1, max: 99 };
        assert_eq!(depths.parse("3,4,6,3"), Some(Value::Wholes(vec![3, 4, 6, 3])));
        assert_eq!(depths.parse("[3, 4, 6, 3]"), Some(Value::Wholes(vec![3, 4, 6, 3])));
        assert_eq!(depths.parse("3,4,6"), None);
        assert_eq!(rate.read_toml(&toml::Value::Float(f64::NAN)), None);
        assert_eq!(rate.read_toml(&toml::Value::String("0.1".into())), None);
        assert_eq!(rate.read_toml(&toml::Value::Integer(1)), Some(Value::Number(1.0)));
    }
}
