//! Names that become paths or URLs. A [`Commit`] and an [`EntityTag`] are checked when they are created, a [`Revision`] and a file
//! name by their check functions before they are used.

use std::fmt;

use sha2::{Digest, Sha256};

use super::error::HubError;

const MAX_NAME_BYTES: usize = 200;

/// One revision of one repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Revision {
    /// `organization/name`, or `name` alone.
    pub repository: String,
    /// A commit, a tag or a branch.
    pub revision: String,
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}", self.repository, self.revision)
    }
}

impl Revision {
    /// Checks that the names are safe in paths and URLs.
    ///
    /// # Errors
    /// [`HubError::UnsafeName`] with the name that is not.
    pub(super) fn check(&self) -> Result<(), HubError> {
        let repository = self.repository.split('/').collect::<Vec<_>>();
        if repository.len() > 2 || !repository.iter().all(|part| is_plain_name(part)) {
            return Err(HubError::UnsafeName(format!("{:?} is not a repository name", self.repository)));
        }
        if !self.revision.split('/').all(is_plain_name) {
            return Err(HubError::UnsafeName(format!("{:?} is not a revision name", self.revision)));
        }
        Ok(())
    }

    /// The commit, if the revision is one.
    pub(super) fn commit(&self) -> Option<Commit> {
        Commit::parse(&self.revision)
    }
}

/// Checks the name of a file at the top of a repository or in a folder there, such as a shard named by an index file.
///
/// # Errors
/// [`HubError::UnsafeName`] if it is in a deeper folder, or if a name starts with a dot, is too long, or has unusual characters.
pub(super) fn check_file_name(name: &str) -> Result<(), HubError> {
    if name.split('/').count() <= 2 && name.split('/').all(is_plain_name) {
        Ok(())
    } else {
        Err(HubError::UnsafeName(format!("{name:?} is not a safe file name; it was not requested")))
    }
}

/// ASCII letters, digits, `-`, `_`, `.` and `+`; not starting with a dot.
fn is_plain_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= MAX_NAME_BYTES
        && !name.starts_with('.')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'+'))
}

/// A commit hash: 40 lower-case hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Commit(String);

impl Commit {
    pub(super) fn parse(text: &str) -> Option<Self> {
        is_hex(text, 40).then(|| Self(text.to_owned()))
    }

    pub(super) fn as_str(&self) -> &str {
        &self.0
    }
}

/// An entity tag of the hub, by what it says about the content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum EntityTag {
    /// 64 digits: SHA-256 of the content. Large files (LFS, Xet) have it.
    Sha256(String),
    /// 40 digits: SHA-1 of `blob <length>\0` and the content, as git computes it. Small files have it.
    GitBlob(String),
    /// Anything else. The content cannot be checked, and the tag must not become a path; the string is the tag.
    Opaque(String),
}

impl EntityTag {
    /// Reads an `ETag` or `X-Linked-Etag` header, with or without `W/` and quotes.
    pub(super) fn parse(header: &str) -> Self {
        let tag = header.trim();
        let tag = tag.strip_prefix("W/").unwrap_or(tag).trim_matches('"');
        if is_hex(tag, 64) {
            Self::Sha256(tag.to_owned())
        } else if is_hex(tag, 40) {
            Self::GitBlob(tag.to_owned())
        } else {
            Self::Opaque(tag.to_owned())
        }
    }

    /// The name of the lock and of the incomplete file, without the extension: the digest; for an opaque tag, a hash of repository,
    /// file and tag.
    pub(super) fn work_name(&self, repository: &str, file: &str) -> String {
        match self {
            Self::Sha256(digest) | Self::GitBlob(digest) => digest.clone(),
            Self::Opaque(tag) => format!("{:x}", Sha256::digest(format!("{repository}\0{file}\0{tag}"))),
        }
    }

    /// The name of the blob: the digest. `None` for an opaque tag: that blob is named after the SHA-256 of its content, which is
    /// known only after the download.
    pub(super) fn blob_name(&self) -> Option<&str> {
        match self {
            Self::Sha256(digest) | Self::GitBlob(digest) => Some(digest),
            Self::Opaque(_) => None,
        }
    }
}

fn is_hex(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use super::*;

    // Finding D of docs/reliability.md: entity tags and commits of a hostile hub became paths.
    #[test]
    fn only_hexadecimal_digests_become_names() {
        let sha256 = "a".repeat(64);
        let git = "0123456789abcdef0123456789abcdef01234567";
        assert_eq!(EntityTag::parse(&format!("\"{sha256}\"")), EntityTag::Sha256(sha256.clone()));
        assert_eq!(EntityTag::parse(&format!("W/\"{git}\"")), EntityTag::GitBlob(git.to_owned()));
        for hostile in ["/etc/passwd", "../../x", "", "\"\"", &"a".repeat(63), &"g".repeat(64), &"é".repeat(32)] {
            let tag = EntityTag::parse(hostile);
            assert!(matches!(tag, EntityTag::Opaque(_)), "{hostile}");
            assert_eq!(tag.blob_name(), None);
            assert!(is_hex(&tag.work_name("org/name", "config.json"), 64), "{hostile}");
        }
    }

    #[test]
    fn a_commit_has_40_hexadecimal_digits() {
        assert!(Commit::parse("0123456789abcdef0123456789abcdef01234567").is_some());
        for wrong in ["main", "../../x", "", "0123456789abcdef0123456789abcdef0123456/"] {
            assert_eq!(Commit::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn file_names_with_several_separators_or_leading_dots_are_refused() {
        check_file_name("model-00001-of-00002.safetensors").unwrap();
        check_file_name("1_Pooling/config.json").unwrap();
        for hostile in [
            "../x",
            "a/../x",
            "a/b/c",
            "a/.b",
            "a/",
            "/b",
            "/etc/passwd",
            "..",
            ".",
            "",
            ".ssh",
            "a\\b",
            "a\0b",
            "a?b",
            "a%2fb",
        ] {
            assert!(check_file_name(hostile).is_err(), "{hostile:?}");
        }
    }

    #[test]
    fn revisions_may_have_slashes_but_no_traversal() {
        let check = |repository: &str, revision: &str| {
            Revision { repository: repository.to_owned(), revision: revision.to_owned() }.check()
        };
        check("org/name", "main").unwrap();
        check("org/name", "refs/pr/1").unwrap();
        check("gpt2", "v1.0").unwrap();
        for (repository, revision) in [
            ("org/name", "../x"),
            ("org/name", "/x"),
            ("org/name", ""),
            ("../x", "main"),
            ("a/b/c", "main"),
            ("", "main"),
        ] {
            assert!(check(repository, revision).is_err(), "{repository} {revision}");
        }
    }
}
