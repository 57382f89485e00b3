//! Fields in the variants that clients send: one text for a list of one, an object for a text, `"true"` for true, `3.0` for 3.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, Unexpected, Visitor};
use serde_json::value::RawValue;
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::{
    AnyOfBuilder, ArrayBuilder, ArrayItems, Object, ObjectBuilder, Schema, SchemaType, Type,
};
use utoipa::{PartialSchema, ToSchema};

use crate::bounded_list::BoundedList;
use crate::error::RerankError;

/// Maximum documents that are parsed, whatever `--max-documents` says.
const MAX_PARSED_DOCUMENTS: usize = 100_000;

/// Maximum names in `rank_fields`, and maximum bytes of each.
const MAX_RANK_FIELDS: usize = 64;
const MAX_RANK_FIELD_BYTES: usize = 256;

/// Parses a body.
///
/// # Errors
/// [`RerankError::Invalid`] with the path of the field that is wrong.
pub(super) fn json<'de, T: Deserialize<'de>>(body: &'de [u8]) -> Result<T, RerankError> {
    // serde also accepts a struct as an array of its fields.
    if body.trim_ascii_start().first() != Some(&b'{') {
        return Err(RerankError::invalid("body", "expected a JSON object with model, query and documents"));
    }
    let mut json = serde_json::Deserializer::from_slice(body);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = match shorten(&error.path().to_string()) {
            path if path == "." || path.is_empty() => "body".to_owned(), // empty: a field whose name is empty
            path => path,
        };
        RerankError::invalid(path, shorten(&error.inner().to_string()))
    })?;
    json.end().map_err(|error| RerankError::invalid("body", error.to_string()))?;
    Ok(value)
}

/// The first 300 characters: serde's messages quote a wrong value as a whole, and it may have megabytes.
fn shorten(message: &str) -> String {
    const CHARS: usize = 300;
    message.char_indices().nth(CHARS).map_or_else(|| message.to_owned(), |(end, _)| format!("{}…", &message[..end]))
}

/// Checks that the query in `field` is not empty.
pub(super) fn query(field: &str, text: String) -> Result<String, RerankError> {
    if text.trim().is_empty() {
        return Err(RerankError::invalid(field, "is empty; give the text to rank for"));
    }
    Ok(text)
}

/// Checks that `value`, if given, is between `min` and `max`.
pub(super) fn in_range(field: &str, value: Option<i64>, min: i64, max: i64) -> Result<Option<usize>, RerankError> {
    let Some(value) = value else { return Ok(None) };
    if (min..=max).contains(&value) {
        return Ok(usize::try_from(value).ok());
    }
    let allowed = if max == i64::MAX { format!("at least {min}") } else { format!("{min} to {max}") };
    Err(RerankError::invalid(field, format!("is {value}; expected {allowed}")))
}

/// A list of texts or objects; one text is a list of one. Each element is a slice of the body's JSON (16 bytes of memory) until
/// [`Documents::texts`] parses it.
#[derive(Debug)]
pub(super) struct Documents<'a>(Vec<Document<'a>>);

/// The JSON of a text, or of an object with texts.
#[derive(Debug, Deserialize)]
#[serde(transparent)]
pub(super) struct Document<'a>(#[serde(borrow)] &'a RawValue);

impl Documents<'_> {
    /// The text of every document.
    ///
    /// # Errors
    /// No document, more than `max` documents, or one without a text. `field` is the list's name, for the message.
    pub(super) fn texts(
        &self,
        field: &str,
        rank_fields: Option<&RankFields>,
        max: usize,
    ) -> Result<Arc<[String]>, RerankError> {
        if self.0.is_empty() {
            return Err(RerankError::invalid(field, "is empty; give at least one text"));
        }
        if self.0.len() > max {
            let problem = format!("has {} texts, the limit is {max}; send several requests", self.0.len());
            return Err(RerankError::invalid(field, problem));
        }
        let text = |(i, document): (usize, &Document<'_>)| document.text(&format!("{field}[{i}]"), rank_fields);
        self.0.iter().enumerate().map(text).collect()
    }
}

impl Document<'_> {
    /// The text. An object's text is its field `text`, or its `rank_fields` joined by newlines.
    pub(super) fn text(&self, field: &str, rank_fields: Option<&RankFields>) -> Result<String, RerankError> {
        let json = self.0.get();
        let wrong = |error: serde_json::Error| RerankError::invalid(field, plain(&error));
        match json.as_bytes().first() {
            Some(b'"') => serde_json::from_str(json).map_err(wrong),
            Some(b'{') => {
                let default = ["text".to_owned()];
                let names = rank_fields.map(|fields| fields.0.as_slice()).filter(|names| !names.is_empty());
                let mut json = serde_json::Deserializer::from_str(json);
                let wanted = WantedTexts(names.unwrap_or(&default));
                let texts: Vec<String> = wanted.deserialize(&mut json).map_err(wrong)?.into_iter().flatten().collect();
                if !texts.is_empty() {
                    return Ok(texts.join("\n"));
                }
                let problem = match names {
                    Some(names) => format!("has none of the rank_fields {} as a text", shorten(&names.join(", "))),
                    None => "has no text; an object needs a field text, or name its fields in rank_fields".to_owned(),
                };
                Err(RerankError::invalid(field, problem))
            }
            _ => Err(RerankError::invalid(
                field,
                format!("is {}; expected a text, or an object with a text", shorten(json)),
            )),
        }
    }
}

/// The error's message without its line and column, which count from the start of the element and not of the body.
fn plain(error: &serde_json::Error) -> String {
    let message = error.to_string();
    shorten(message.split(" at line ").next().unwrap_or(&message))
}

impl<'de: 'a, 'a> Deserialize<'de> for Documents<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = <&'de RawValue>::deserialize(deserializer)?;
        if value.get().starts_with('"') {
            return Ok(Self(vec![Document(value)]));
        }
        let mut list = serde_json::Deserializer::from_str(value.get());
        let documents = list
            .deserialize_any(BoundedList::new(MAX_PARSED_DOCUMENTS, "texts"))
            .map_err(|error| D::Error::custom(plain(&error)))?;
        Ok(Self(documents))
    }
}

/// The names in `rank_fields`: for documents that are objects, the fields that make up the text.
#[derive(Debug)]
pub(super) struct RankFields(Vec<String>);

impl<'de> Deserialize<'de> for RankFields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let names: Vec<String> = deserializer.deserialize_seq(BoundedList::new(MAX_RANK_FIELDS, "field names"))?;
        if names.iter().any(|name| name.len() > MAX_RANK_FIELD_BYTES) {
            return Err(D::Error::custom(format_args!("a name of more than {MAX_RANK_FIELD_BYTES} bytes")));
        }
        Ok(Self(names))
    }
}

/// Reads those fields of an object that have these names, in the order of the names. Values that are not texts are skipped.
struct WantedTexts<'a>(&'a [String]);

impl<'de> DeserializeSeed<'de> for WantedTexts<'_> {
    type Value = Vec<Option<String>>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for WantedTexts<'_> {
    type Value = Vec<Option<String>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with a text")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<Self::Value, A::Error> {
        let mut texts = vec![None; self.0.len()];
        while let Some(name) = object.next_key::<Cow<'_, str>>()? {
            let wanted = self.0.iter().position(|wanted| *wanted == name);
            match wanted {
                Some(i) if texts[i].is_none() => {
                    let value: &RawValue = object.next_value()?;
                    if value.get().starts_with('"') {
                        texts[i] = Some(serde_json::from_str(value.get()).map_err(A::Error::custom)?);
                    }
                }
                _ => drop(object.next_value::<IgnoredAny>()?),
            }
        }
        Ok(texts)
    }
}

// The OpenAPI schemas. A type with a name, unlike a `schema_with` function, keeps the field's description.

impl ToSchema for Document<'_> {}

impl PartialSchema for Document<'_> {
    fn schema() -> RefOr<Schema> {
        let object = ObjectBuilder::new().property("text", text_schema()).build();
        AnyOfBuilder::new().item(text_schema()).item(object).into()
    }
}

impl ToSchema for Documents<'_> {}

impl PartialSchema for Documents<'_> {
    fn schema() -> RefOr<Schema> {
        let documents = ArrayItems::RefOrSchema(Box::new(Document::schema()));
        let list = ArrayBuilder::new().items(documents).min_items(Some(1)).build();
        AnyOfBuilder::new().item(list).item(text_schema()).into()
    }
}

/// The schema of [`flag`].
pub(super) enum Flag {}

impl ToSchema for Flag {}

impl PartialSchema for Flag {
    fn schema() -> RefOr<Schema> {
        flag_or(["true", "false", "True", "False"])
    }
}

impl ToSchema for ChunkDetail {}

impl PartialSchema for ChunkDetail {
    fn schema() -> RefOr<Schema> {
        flag_or(["best", "all", "true", "false", "True", "False"])
    }
}

/// A Boolean, null or one of the words.
fn flag_or<const N: usize>(words: [&'static str; N]) -> RefOr<Schema> {
    let text = ObjectBuilder::new().schema_type(Type::String).enum_values(Some(words)).build();
    let flag = ObjectBuilder::new().schema_type(SchemaType::Array(vec![Type::Boolean, Type::Null])).build();
    AnyOfBuilder::new().item(flag).item(text).into()
}

fn text_schema() -> Object {
    ObjectBuilder::new().schema_type(Type::String).build()
}

/// A whole number or null; `3.0` is 3.
pub(super) fn whole<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<i64>, D::Error> {
    struct WholeVisitor;
    impl Visitor<'_> for WholeVisitor {
        type Value = Option<i64>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a whole number")
        }

        fn visit_unit<E: Error>(self) -> Result<Option<i64>, E> {
            Ok(None)
        }

        fn visit_i64<E: Error>(self, value: i64) -> Result<Option<i64>, E> {
            Ok(Some(value))
        }

        fn visit_u64<E: Error>(self, value: u64) -> Result<Option<i64>, E> {
            i64::try_from(value).map(Some).map_err(|_| E::invalid_value(Unexpected::Unsigned(value), &self))
        }

        fn visit_f64<E: Error>(self, value: f64) -> Result<Option<i64>, E> {
            // Above 2^53 (9.007e15) an f64 does not represent every whole number.
            let is_whole = value.fract() == 0.0 && value.abs() < 9e15;
            if is_whole { Ok(Some(value as i64)) } else { Err(E::invalid_value(Unexpected::Float(value), &self)) }
        }
    }
    deserializer.deserialize_any(WholeVisitor)
}

/// A boolean, `"true"` or `"false"` in upper or lower case, or null.
pub(super) fn flag<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<bool>, D::Error> {
    const WORDS: &[(&str, bool)] = &[("true", true), ("false", false)];
    deserializer.deserialize_any(WordVisitor { expected: "true or false", words: WORDS })
}

/// Which chunks a result describes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ChunkDetail {
    None,
    /// The best one.
    Best,
    /// The best one, and the list of all.
    All,
}

/// Reads a [`ChunkDetail`]: false is `None`, true or `"best"` is `Best`, `"all"` is `All`; null is the default.
pub(super) fn chunk_detail<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<ChunkDetail>, D::Error> {
    const WORDS: &[(&str, ChunkDetail)] = &[
        ("false", ChunkDetail::None),
        ("true", ChunkDetail::Best),
        ("best", ChunkDetail::Best),
        ("all", ChunkDetail::All),
    ];
    deserializer.deserialize_any(WordVisitor { expected: r#"true, false, "best" or "all""#, words: WORDS })
}

/// Reads one of some words, in upper or lower case. A boolean is the word `true` or `false`; null is `None`.
struct WordVisitor<T: 'static> {
    expected: &'static str,
    words: &'static [(&'static str, T)],
}

impl<T: Copy> Visitor<'_> for WordVisitor<T> {
    type Value = Option<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.expected)
    }

    fn visit_unit<E: Error>(self) -> Result<Option<T>, E> {
        Ok(None)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Option<T>, E> {
        self.visit_str(if value { "true" } else { "false" })
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Option<T>, E> {
        let word = self.words.iter().find(|(word, _)| word.eq_ignore_ascii_case(text));
        word.map(|&(_, value)| Some(value)).ok_or_else(|| E::invalid_value(Unexpected::Str(text), &self))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_out_of_range_is_refused_with_the_range() {
        let message = |value, min, max| in_range("field", Some(value), min, max).unwrap_err().to_string();
        assert!(message(0, 1, i64::MAX).contains("is 0; expected at least 1"));
        assert!(message(81, 0, 80).contains("is 81; expected 0 to 80"));
        assert_eq!(in_range("field", Some(80), 0, 80).unwrap(), Some(80));
        assert_eq!(in_range("field", None, 0, 80).unwrap(), None);
    }

    #[test]
    fn the_length_of_a_field_name_is_limited() {
        let parse = |bytes: usize| serde_json::from_str::<RankFields>(&format!("[\"{}\"]", "a".repeat(bytes)));
        assert!(parse(MAX_RANK_FIELD_BYTES).is_ok());
        assert!(parse(MAX_RANK_FIELD_BYTES + 1).is_err());
    }

    #[test]
    fn of_a_field_that_a_document_has_twice_the_first_is_read() {
        let mut object = serde_json::Deserializer::from_str(r#"{"a": 1, "b": "x", "a": "first", "a": "second"}"#);
        let texts = WantedTexts(&["a".to_owned()]).deserialize(&mut object).unwrap();
        assert_eq!(texts, [Some("first".to_owned())]);
    }
}
