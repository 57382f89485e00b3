//! The API keys that the server accepts.

use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

/// SHA-256 digests of the valid keys. If there are none, requests need no key.
#[derive(Clone, Default)]
pub struct Keys(Vec<[u8; 32]>);

impl Keys {
    /// Trims the keys and ignores empty ones.
    pub fn new<'a>(keys: impl IntoIterator<Item = &'a str>) -> Self {
        Self(keys.into_iter().map(str::trim).filter(|key| !key.is_empty()).map(digest).collect())
    }

    /// Whether there are no keys, so that requests need none.
    pub fn is_open(&self) -> bool {
        self.0.is_empty()
    }

    /// Compares the key's digest with every valid one in constant time.
    pub(super) fn contains(&self, key: &str) -> bool {
        let offered = digest(key);
        let hit = self.0.iter().fold(Choice::from(0), |hit, known| hit | known.ct_eq(&offered));
        hit.into()
    }
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} keys", self.0.len())
    }
}

fn digest(key: &str) -> [u8; 32] {
    Sha256::digest(key.as_bytes()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_keys_match() {
        let keys = Keys::new(["secret", " ", ""]);
        assert!(!keys.is_open() && keys.contains("secret"));
        for wrong in ["", "secre", "secret2", "Secret"] {
            assert!(!keys.contains(wrong), "{wrong:?}");
        }
    }
}
