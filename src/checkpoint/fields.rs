//! The fields of a JSON configuration file. An absent field and a null one are the same, except for `is_null`. Errors name their
//! field.

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value};

/// A JSON object.
#[derive(Debug, Clone)]
pub(super) struct Fields(Map<String, Value>);

impl Fields {
    pub(super) fn parse(json: &str) -> Result<Self> {
        Ok(Self(serde_json::from_str(json)?))
    }

    /// The field's value; `None` if it is absent or null.
    pub(super) fn get(&self, field: &str) -> Option<&Value> {
        self.0.get(field).filter(|value| !value.is_null())
    }

    pub(super) fn is_null(&self, field: &str) -> bool {
        self.0.get(field).is_some_and(Value::is_null)
    }

    pub(super) fn object(&self, field: &str) -> Result<Option<Self>> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::Object(object)) => Ok(Some(Self(object.clone()))),
            Some(value) => bail!("{field} is {value}; expected an object"),
        }
    }

    pub(super) fn optional_integer(&self, field: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let integer = value.as_u64().and_then(|integer| usize::try_from(integer).ok());
        Ok(Some(integer.with_context(|| format!("{field} is {value}; expected a non-negative integer"))?))
    }

    pub(super) fn integer(&self, field: &str) -> Result<usize> {
        self.optional_integer(field)?.with_context(|| format!("{field} is missing"))
    }

    pub(super) fn number(&self, field: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        Ok(Some(value.as_f64().with_context(|| format!("{field} is {value}; expected a number"))?))
    }

    pub(super) fn flag(&self, field: &str, default: bool) -> Result<bool> {
        let Some(value) = self.get(field) else { return Ok(default) };
        value.as_bool().with_context(|| format!("{field} is {value}; expected true or false"))
    }

    pub(super) fn text(&self, field: &str) -> Result<Option<&str>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        Ok(Some(value.as_str().with_context(|| format!("{field} is {value}; expected a string"))?))
    }

    /// The strings of an array.
    pub(super) fn texts(&self, field: &str) -> Result<Option<Vec<&str>>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let texts = value.as_array().and_then(|values| values.iter().map(Value::as_str).collect());
        Ok(Some(texts.with_context(|| format!("{field} is {value}; expected an array of strings"))?))
    }

    /// The number of labels: the entries of `id2label`, else `num_labels`, else 1.
    pub(super) fn labels(&self) -> Result<usize> {
        match self.get("id2label") {
            Some(Value::Object(labels)) => Ok(labels.len()),
            Some(value) => bail!("id2label is {value}; expected an object"),
            None => Ok(self.optional_integer("num_labels")?.unwrap_or(1)),
        }
    }
}
