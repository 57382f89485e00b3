//! A JSON list that is refused while it is read if it has too many elements, before its vector grows.

use std::fmt;
use std::marker::PhantomData;

use serde::Deserialize;
use serde::de::{Error, SeqAccess, Visitor};

/// Reads a list of at most `max` elements, which the errors call `elements`.
pub(crate) struct BoundedList<T> {
    max: usize,
    elements: &'static str,
    element: PhantomData<T>,
}

impl<T> BoundedList<T> {
    pub(crate) fn new(max: usize, elements: &'static str) -> Self {
        Self { max, elements, element: PhantomData }
    }
}

impl<'de, T: Deserialize<'de>> Visitor<'de> for BoundedList<T> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a list of {}", self.elements)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<T>, A::Error> {
        let mut all = Vec::new();
        while let Some(element) = list.next_element()? {
            if all.len() == self.max {
                return Err(A::Error::custom(format_args!("more than {} {}", self.max, self.elements)));
            }
            all.push(element);
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserializer as _;

    use super::*;

    #[test]
    fn one_element_too_many_is_an_error() {
        let read = |json: &str| {
            let mut json = serde_json::Deserializer::from_str(json);
            json.deserialize_seq(BoundedList::<u8>::new(2, "numbers")).map_err(|error| error.to_string())
        };
        assert_eq!((read("[]"), read("[1,2]")), (Ok(vec![]), Ok(vec![1, 2])));
        assert!(read("[1,2,3]").unwrap_err().contains("more than 2 numbers"));
        assert!(read("7").unwrap_err().contains("a list of numbers"));
    }
}
