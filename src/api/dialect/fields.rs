//! Fields as clients really write them: one text for a list, objects for texts, `"true"` for true, `3.0` for 3.

use std::fmt;

use serde::de::{Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Unexpected, Visitor};
use serde::{Deserialize, de};

/// Beyond any setting: where the list of documents stops growing while it is parsed.
const MAX_PARSED_DOCUMENTS: usize = 100_000;

/// A list of texts; also one text; an element may also be an object with a `text`.
///
/// Written by hand: serde's untagged enums hold a whole element in memory in a form sixteen times its size first.
#[derive(Debug)]
pub(super) struct Documents(pub(super) Vec<String>);

impl<'de> Deserialize<'de> for Documents {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ListVisitor;
        impl<'de> Visitor<'de> for ListVisitor {
            type Value = Documents;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of texts")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Documents, E> {
                Ok(Documents(vec![text.to_owned()]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Documents, A::Error> {
                let mut documents = Vec::new();
                while let Some(Document(text)) = list.next_element()? {
                    if documents.len() == MAX_PARSED_DOCUMENTS {
                        return Err(A::Error::custom(format_args!("more than {MAX_PARSED_DOCUMENTS} documents")));
                    }
                    documents.push(text);
                }
                Ok(Documents(documents))
            }
        }
        deserializer.deserialize_any(ListVisitor)
    }
}

/// One text, or an object with a `text`.
struct Document(String);

impl<'de> Deserialize<'de> for Document {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct DocumentVisitor;
        impl<'de> Visitor<'de> for DocumentVisitor {
            type Value = Document;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text, or an object with a text")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Document, E> {
                Ok(Document(text.to_owned()))
            }

            fn visit_string<E: Error>(self, text: String) -> Result<Document, E> {
                Ok(Document(text))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<Document, A::Error> {
                let mut text = None;
                while let Some(key) = object.next_key::<String>()? {
                    if key != "text" {
                        object.next_value::<IgnoredAny>()?;
                    } else if text.replace(object.next_value::<String>()?).is_some() {
                        return Err(de::Error::duplicate_field("text"));
                    }
                }
                text.map(Document).ok_or_else(|| de::Error::missing_field("text"))
            }
        }
        deserializer.deserialize_any(DocumentVisitor)
    }
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
