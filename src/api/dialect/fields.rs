//! Fields as clients really write them: one text for a list, objects for texts, `"true"` for true, `3.0` for 3.

use std::fmt;
use std::sync::Arc;

use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Unexpected, Visitor};
use utoipa::openapi::schema::{
    AnyOfBuilder, ArrayBuilder, ArrayItems, Object, ObjectBuilder, Schema, SchemaType, Type,
};

use crate::error::RerankError;

/// Beyond any setting: where the list of documents stops growing while it is parsed.
const MAX_PARSED_DOCUMENTS: usize = 100_000;

/// Reads a body, naming the field that is wrong.
pub(super) fn json<T: DeserializeOwned>(body: &[u8]) -> Result<T, RerankError> {
    // serde would read an array as the fields in their order.
    if body.trim_ascii_start().first() != Some(&b'{') {
        return Err(RerankError::invalid("body", "expected a JSON object with model, query and documents"));
    }
    let mut json = serde_json::Deserializer::from_slice(body);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = short(&error.path().to_string());
        RerankError::invalid(if path == "." { "body".to_owned() } else { path }, short(&error.inner().to_string()))
    })?;
    json.end().map_err(|error| RerankError::invalid("body", error.to_string()))?;
    Ok(value)
}

/// Enough to see what is meant: a wrong value may be megabytes long, and serde quotes it whole.
fn short(message: &str) -> String {
    const CHARS: usize = 300;
    message.char_indices().nth(CHARS).map_or_else(|| message.to_owned(), |(end, _)| format!("{}…", &message[..end]))
}

/// A query that is not empty.
pub(super) fn query(text: String) -> Result<String, RerankError> {
    if text.trim().is_empty() {
        return Err(RerankError::invalid("query", "is empty; give the text to rank for"));
    }
    Ok(text)
}

/// A number between `min` and `max`, where it is given.
pub(super) fn in_range(field: &str, value: Option<i64>, min: i64, max: i64) -> Result<Option<usize>, RerankError> {
    let Some(value) = value else { return Ok(None) };
    if (min..=max).contains(&value) {
        return Ok(usize::try_from(value).ok());
    }
    let allowed = if max == i64::MAX { format!("at least {min}") } else { format!("{min} to {max}") };
    Err(RerankError::invalid(field, format!("is {value}; expected {allowed}")))
}

/// A list of texts; also one text; an element may also be an object.
///
/// Written by hand: serde's untagged enums hold a whole element in memory in a form sixteen times its size first.
#[derive(Debug)]
pub(super) struct Documents(Vec<Document>);

/// A text, or an object's texts by their names.
#[derive(Debug)]
pub(super) enum Document {
    Text(String),
    Fields(Vec<(String, String)>),
}

impl Documents {
    /// Every document's text, at least one and at most `max`. `field` is the list's name, for errors.
    pub(super) fn texts(
        self,
        field: &str,
        rank_fields: Option<&[String]>,
        max: usize,
    ) -> Result<Arc<[String]>, RerankError> {
        if self.0.is_empty() {
            return Err(RerankError::invalid(field, "is empty; give at least one text"));
        }
        if self.0.len() > max {
            let problem = format!("has {} texts, the limit is {max}; send several requests", self.0.len());
            return Err(RerankError::invalid(field, problem));
        }
        let text = |(i, document): (usize, Document)| document.text(&format!("{field}[{i}]"), rank_fields);
        self.0.into_iter().enumerate().map(text).collect()
    }
}

impl Document {
    /// Its text: an object's `text`, or its `rank_fields` one a line.
    pub(super) fn text(self, field: &str, rank_fields: Option<&[String]>) -> Result<String, RerankError> {
        let fields = match self {
            Self::Text(text) => return Ok(text),
            Self::Fields(fields) => fields,
        };
        let named = |name: &str| fields.iter().find(|(own, _)| own == name).map(|(_, text)| text.as_str());
        let wanted = rank_fields.filter(|names| !names.is_empty());
        let texts: Vec<&str> = match wanted {
            Some(names) => names.iter().filter_map(|name| named(name)).collect(),
            None => named("text").into_iter().collect(),
        };
        if texts.is_empty() {
            let problem = match wanted {
                Some(names) => format!("has none of the rank_fields {} as a text", short(&names.join(", "))),
                None => "has no text; an object needs a field text, or name its fields in rank_fields".to_owned(),
            };
            return Err(RerankError::invalid(field, problem));
        }
        Ok(texts.join("\n"))
    }
}

impl<'de> Deserialize<'de> for Documents {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ListVisitor;
        impl<'de> Visitor<'de> for ListVisitor {
            type Value = Documents;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of texts")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Documents, E> {
                Ok(Documents(vec![Document::Text(text.to_owned())]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Documents, A::Error> {
                let mut documents = Vec::new();
                while let Some(document) = list.next_element()? {
                    if documents.len() == MAX_PARSED_DOCUMENTS {
                        return Err(A::Error::custom(format_args!("more than {MAX_PARSED_DOCUMENTS} documents")));
                    }
                    documents.push(document);
                }
                Ok(Documents(documents))
            }
        }
        deserializer.deserialize_any(ListVisitor)
    }
}

impl<'de> Deserialize<'de> for Document {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct DocumentVisitor;
        impl<'de> Visitor<'de> for DocumentVisitor {
            type Value = Document;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text, or an object with a text")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Document, E> {
                Ok(Document::Text(text.to_owned()))
            }

            fn visit_string<E: Error>(self, text: String) -> Result<Document, E> {
                Ok(Document::Text(text))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<Document, A::Error> {
                let mut fields = Vec::new();
                while let Some(name) = object.next_key::<String>()? {
                    if let MaybeText(Some(text)) = object.next_value()? {
                        fields.push((name, text));
                    }
                }
                Ok(Document::Fields(fields))
            }
        }
        deserializer.deserialize_any(DocumentVisitor)
    }
}

/// The value of an object's field where it is a text; anything else is skipped unread.
struct MaybeText(Option<String>);

impl<'de> Deserialize<'de> for MaybeText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextVisitor;
        impl<'de> Visitor<'de> for TextVisitor {
            type Value = MaybeText;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("anything")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<MaybeText, E> {
                Ok(MaybeText(Some(text.to_owned())))
            }

            fn visit_unit<E: Error>(self) -> Result<MaybeText, E> {
                Ok(MaybeText(None))
            }

            fn visit_bool<E: Error>(self, _: bool) -> Result<MaybeText, E> {
                Ok(MaybeText(None))
            }

            fn visit_i64<E: Error>(self, _: i64) -> Result<MaybeText, E> {
                Ok(MaybeText(None))
            }

            fn visit_u64<E: Error>(self, _: u64) -> Result<MaybeText, E> {
                Ok(MaybeText(None))
            }

            fn visit_f64<E: Error>(self, _: f64) -> Result<MaybeText, E> {
                Ok(MaybeText(None))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<MaybeText, A::Error> {
                while list.next_element::<IgnoredAny>()?.is_some() {}
                Ok(MaybeText(None))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<MaybeText, A::Error> {
                while object.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(MaybeText(None))
            }
        }
        deserializer.deserialize_any(TextVisitor)
    }
}

/// The contract of [`Document`].
pub(super) fn document_schema() -> Schema {
    let object = ObjectBuilder::new().property("text", text_schema()).build();
    AnyOfBuilder::new().item(text_schema()).item(object).build().into()
}

/// The contract of [`Documents`].
pub(super) fn documents_schema() -> Schema {
    let documents = ArrayItems::RefOrSchema(Box::new(document_schema().into()));
    let list = ArrayBuilder::new().items(documents).min_items(Some(1)).build();
    AnyOfBuilder::new().item(list).item(text_schema()).build().into()
}

/// The contract of [`flag`].
pub(super) fn flag_schema() -> Schema {
    let text =
        ObjectBuilder::new().schema_type(Type::String).enum_values(Some(["true", "false", "True", "False"])).build();
    let flag = ObjectBuilder::new().schema_type(SchemaType::Array(vec![Type::Boolean, Type::Null])).build();
    AnyOfBuilder::new().item(flag).item(text).build().into()
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
            // Beyond 2^53 a float no longer says which whole number is meant.
            let is_whole = value.fract() == 0.0 && value.abs() < 9e15;
            if is_whole { Ok(Some(value as i64)) } else { Err(E::invalid_value(Unexpected::Float(value), &self)) }
        }
    }
    deserializer.deserialize_any(WholeVisitor)
}

/// A boolean, `"true"` or `"false"` in any case, or null.
pub(super) fn flag<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<bool>, D::Error> {
    struct FlagVisitor;
    impl Visitor<'_> for FlagVisitor {
        type Value = Option<bool>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("true or false")
        }

        fn visit_unit<E: Error>(self) -> Result<Option<bool>, E> {
            Ok(None)
        }

        fn visit_bool<E: Error>(self, value: bool) -> Result<Option<bool>, E> {
            Ok(Some(value))
        }

        fn visit_str<E: Error>(self, text: &str) -> Result<Option<bool>, E> {
            match text.to_ascii_lowercase().as_str() {
                "true" => Ok(Some(true)),
                "false" => Ok(Some(false)),
                _ => Err(E::invalid_value(Unexpected::Str(text), &self)),
            }
        }
    }
    deserializer.deserialize_any(FlagVisitor)
}
