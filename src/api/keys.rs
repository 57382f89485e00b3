//! The API keys that the server accepts.

use anyhow::{Result, bail, ensure};
use sha2::{Digest, Sha256};
use subtle::{ConditionallySelectable, ConstantTimeEq};

use crate::client::{Client, ClientId, RateLimits};

/// Keys of fewer characters are guessed too easily, so a warning is logged at start.
const SHORT_KEY_CHARS: usize = 16;
/// Maximum characters of a key's name.
const MAX_NAME_CHARS: usize = 64;
/// Keys that have a name of their own in metrics.
const MAX_KEY_NAMES: usize = 100;

/// The valid keys, as SHA-256 digests, and their clients. If there are none, requests need no key.
#[derive(Clone, Default)]
pub struct Keys {
    known: Vec<Key>,
    /// The client of all requests if no key is needed.
    anyone: Client,
    short_keys: usize,
    /// Larger than the number of every client so far.
    next_number: u32,
}

#[derive(Clone)]
struct Key {
    digest: [u8; 32],
    client: Client,
}

/// A key as configured: `KEY` or `KEY name=NAME`.
struct KeyLine<'a> {
    key: &'a str,
    name: Option<&'a str>,
}

impl<'a> KeyLine<'a> {
    /// Reads the key at `position`, counted from 1.
    ///
    /// # Errors
    /// The message names the position and does not contain the key: a second word may be part of one.
    fn parse(text: &'a str, position: usize) -> Result<Self> {
        let is_plain = text.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ');
        let words: Vec<&str> = text.split(' ').filter(|word| !word.is_empty()).collect();
        let (key, name) = match words[..] {
            [] if is_plain => ("", None),
            [key] if is_plain => (key, None),
            [key, name] if is_plain && name.starts_with("name=") => (key, name.strip_prefix("name=")),
            _ => bail!(
                "key {position} has a space, a control character or a character that is not ASCII; clients cannot send it. \
                 Expected KEY, or KEY name=NAME"
            ),
        };
        ensure!(
            name.is_none_or(|name| (1..=MAX_NAME_CHARS).contains(&name.len()) && name.bytes().all(is_name_char)),
            "the name of key {position} is not valid; expected 1 to {MAX_NAME_CHARS} letters, digits, '-', '_' or '.'"
        );
        Ok(Self { key, name })
    }
}

fn is_name_char(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.')
}

impl Keys {
    /// Reads keys of the form `KEY` or `KEY name=NAME`. Equal keys count once, empty ones not at all. Each key is a client with
    /// limits of its own. A key without a name is called `key-1`, `key-2` and so on in metrics, by its position; keys after the
    /// first 100 share the name `other`.
    ///
    /// # Errors
    /// A key has a character other than visible ASCII, or a name is not valid or not unique. The message does not contain the key.
    pub fn new<'a>(keys: impl IntoIterator<Item = &'a str>, limits: RateLimits) -> Result<Self> {
        let mut known: Vec<([u8; 32], String)> = Vec::new();
        let mut short_keys = 0;
        for (i, text) in keys.into_iter().map(str::trim).enumerate() {
            let KeyLine { key, name } = KeyLine::parse(text, i + 1)?;
            if !key.is_empty() && known.iter().all(|(other, _)| *other != digest(key)) {
                let name = match name {
                    _ if known.len() >= MAX_KEY_NAMES => "other".to_owned(),
                    Some(name) => name.to_owned(),
                    None => format!("key-{}", known.len() + 1),
                };
                ensure!(
                    name == "other" || known.iter().all(|(_, other)| *other != name),
                    "key {} has the name {name:?}, which another key has; choose another name",
                    i + 1
                );
                known.push((digest(key), name));
                short_keys += usize::from(key.len() < SHORT_KEY_CHARS);
            }
        }
        let several = known.len() > 1;
        let next_number = known.len() as u32;
        let id = |i: usize| if several { ClientId::Key(i as u32) } else { ClientId::Only };
        let client = |i, name: &str| Client::new(id(i), limits).named(name);
        let known =
            known.iter().enumerate().map(|(i, (digest, name))| Key { digest: *digest, client: client(i, name) });
        Ok(Self { known: known.collect(), anyone: Client::default(), short_keys, next_number })
    }

    /// These keys, to be used instead of `old`. A key that both have remains the same client, with what is left of its rate limits
    /// unless they change. No other key becomes a client that `old` has.
    #[must_use]
    pub fn replacing(mut self, old: &Self) -> Self {
        self.next_number = old.next_number;
        for key in &mut self.known {
            let same = old.known.iter().find(|known| known.digest == key.digest);
            let id = match (key.client.id, same.map(|known| known.client.id)) {
                (ClientId::Only, _) => ClientId::Only,
                (ClientId::Key(_), Some(kept @ ClientId::Key(_))) => kept,
                (ClientId::Key(_), _) => {
                    self.next_number += 1;
                    ClientId::Key(self.next_number - 1)
                }
            };
            key.client = key.client.continuing(same.map(|known| &known.client), id);
        }
        self
    }

    /// The keys in the text of a key file: one on each line. Empty lines, lines that start with `#`, and a byte order mark at
    /// the start are ignored.
    pub fn lines(file: &str) -> impl Iterator<Item = &str> {
        let file = file.strip_prefix('\u{feff}').unwrap_or(file);
        file.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'))
    }

    /// Whether there are no keys, so that requests need none.
    pub fn is_open(&self) -> bool {
        self.known.is_empty()
    }

    /// Number of keys that are easy to guess because they are short.
    pub fn short_keys(&self) -> usize {
        self.short_keys
    }

    /// The client with the key; `None` if the key is missing or wrong. The key is compared with every valid one in constant
    /// time. If no key is needed, everybody is the same client.
    pub(super) fn client(&self, key: Option<&str>) -> Option<&Client> {
        if self.is_open() {
            return Some(&self.anyone);
        }
        let offered = digest(key?);
        let mut found = u32::MAX;
        for (i, known) in self.known.iter().enumerate() {
            found.conditional_assign(&(i as u32), known.digest.ct_eq(&offered));
        }
        self.known.get(found as usize).map(|key| &key.client)
    }
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} keys", self.known.len())
    }
}

fn digest(key: &str) -> [u8; 32] {
    Sha256::digest(key.as_bytes()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(texts: &[&str]) -> Result<Keys> {
        Keys::new(texts.iter().copied(), RateLimits::default())
    }

    #[test]
    fn only_whole_keys_match() {
        let keys = keys(&["secret", " other "]).unwrap();
        assert_eq!(keys.client(Some("secret")).unwrap().id, ClientId::Key(0));
        assert_eq!(keys.client(Some("other")).unwrap().id, ClientId::Key(1));
        for wrong in [Some(""), Some("secre"), Some("secret2"), Some("Secret"), None] {
            assert!(keys.client(wrong).is_none(), "{wrong:?}");
        }
    }

    #[test]
    fn one_key_or_none_is_one_client() {
        let open = keys(&["", " "]).unwrap();
        assert!(open.is_open() && open.client(None).unwrap().id == ClientId::Only);
        let one = keys(&["a-key", "a-key"]).unwrap();
        assert_eq!(one.client(Some("a-key")).unwrap().id, ClientId::Only);
        assert_eq!(one.short_keys(), 1);
    }

    #[test]
    fn keys_that_no_client_can_send_are_refused_without_repeating_them() {
        for wrong in ["two words", "three words name=a", "three name=a words", "schl\u{fc}ssel", "tab\tin it", "nul\0"]
        {
            let error = keys(&["right", wrong]).unwrap_err().to_string();
            assert!(error.contains("key 2") && !error.contains(wrong), "{error}");
        }
    }

    #[test]
    fn a_key_has_the_name_behind_it_or_its_position() {
        let named = |texts: &[&str]| {
            let keys = keys(texts)?;
            anyhow::Ok(
                keys.known.iter().map(|key| key.client.key_name.as_deref().unwrap().to_owned()).collect::<Vec<_>>(),
            )
        };
        assert_eq!(
            named(&["a name=search", "b", "", "a name=again", "c   name=x.y-z_1"]).unwrap(),
            ["search", "key-2", "x.y-z_1"]
        );
        assert!(keys(&["a name=search"]).unwrap().client(Some("a")).is_some());
        for wrong in [
            ["a", "b name="],
            ["a", "b name=sch\u{f6}n"],
            ["a", "b name=a,b"],
            ["a name=x", "b name=x"],
            ["a", "b name=key-1"],
        ] {
            let error = named(&wrong).unwrap_err().to_string();
            assert!(error.contains("key 2"), "{wrong:?}: {error}");
        }
        let many: Vec<String> = (0..103).map(|i| format!("secret-{i}")).collect();
        let names = named(&many.iter().map(String::as_str).collect::<Vec<_>>()).unwrap();
        assert_eq!((names[99].as_str(), names[100].as_str(), names[102].as_str()), ("key-100", "other", "other"));
        assert!(Client::default().key_name.is_none());
    }

    #[test]
    fn a_key_file_may_have_comments_empty_lines_and_a_byte_order_mark() {
        let lines: Vec<&str> = Keys::lines("\u{feff}# staff\nfirst\r\n\n  second  \n#third\n").collect();
        assert_eq!(lines, ["first", "second"]);
    }

    #[test]
    fn a_key_that_stays_is_the_same_client_with_what_is_left_of_its_limits() {
        let limited = |texts: &[&str], n| {
            let limits = RateLimits { requests_per_minute: std::num::NonZeroU32::new(n), tokens_per_minute: None };
            Keys::new(texts.iter().copied(), limits).unwrap()
        };
        let client = |keys: &Keys, key| keys.client(Some(key)).unwrap().clone();
        let old = limited(&["a", "b", "c"], 1);
        client(&old, "b").take_request().unwrap();
        let new = limited(&["d", "b", "c"], 1).replacing(&old);
        assert!(new.client(Some("a")).is_none(), "a removed key is refused");
        let ids = ["b", "c", "d"].map(|key| client(&new, key).id);
        assert_eq!(ids, [ClientId::Key(1), ClientId::Key(2), ClientId::Key(3)], "no id is used for two keys");
        assert!(client(&new, "b").take_request().is_err());
        assert!(client(&new, "c").take_request().is_ok());
        let newer = limited(&["e", "b"], 2).replacing(&new);
        assert_eq!(client(&newer, "e").id, ClientId::Key(4));
        assert!(client(&newer, "b").take_request().is_ok(), "another limit begins anew");
        let one = limited(&["b"], 2).replacing(&newer);
        assert_eq!(client(&one, "b").id, ClientId::Only);
        assert_eq!(client(&limited(&["b", "f"], 2).replacing(&one), "b").id, ClientId::Key(5));
    }
}
