//! What responses of the hub mean. Pure functions of status and headers.

use super::error::HubError;
use super::names::{Commit, EntityTag};

/// What the hub announces about a file before its content is requested.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct FileMetadata {
    pub(super) commit: Commit,
    pub(super) etag: EntityTag,
    /// Size in bytes.
    pub(super) size: Option<u64>,
}

/// The headers that describe a file, as received.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct FileHeaders {
    /// `X-Repo-Commit`
    pub(super) commit: Option<String>,
    /// `X-Linked-Etag`, otherwise `ETag`
    pub(super) etag: Option<String>,
    /// `X-Linked-Size`, otherwise `Content-Length`
    pub(super) size: Option<u64>,
}

impl FileHeaders {
    /// Checks the headers.
    ///
    /// # Errors
    /// [`HubError::InvalidResponse`]: a commit that is not 40 hexadecimal digits, or not the requested one; no entity tag.
    pub(super) fn check(self, requested: Option<&Commit>) -> Result<FileMetadata, HubError> {
        let commit = match (self.commit, requested) {
            (Some(text), _) => Commit::parse(&text).ok_or_else(|| {
                invalid(format!("its x-repo-commit header is {text:?}, not a commit of 40 hexadecimal digits"))
            })?,
            (None, Some(requested)) => requested.clone(),
            (None, None) => {
                return Err(invalid(
                    "its answer has no x-repo-commit header, so it is not a model hub; check HF_ENDPOINT".to_owned(),
                ));
            }
        };
        if let Some(requested) = requested.filter(|requested| **requested != commit) {
            return Err(invalid(format!(
                "asked for commit {}, it answered for {}",
                requested.as_str(),
                commit.as_str()
            )));
        }
        let etag = self.etag.ok_or_else(|| invalid("its answer has no etag header".to_owned()))?;
        Ok(FileMetadata { commit, etag: EntityTag::parse(&etag), size: self.size })
    }
}

fn invalid(what: String) -> HubError {
    HubError::InvalidResponse(format!("the hub's answer is not usable: {what}"))
}

/// The headers of a content response that decide what its body is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct ContentHeaders {
    pub(super) status: u16,
    pub(super) content_length: Option<u64>,
    pub(super) content_range: Option<String>,
    pub(super) etag: Option<String>,
}

/// What to do with a content response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum BodyAction {
    /// The body continues the incomplete file; the whole file has `total` bytes.
    Append { total: Option<u64> },
    /// The body is the whole file: drop the bytes so far.
    Restart { total: Option<u64> },
    /// The response does not continue the bytes so far: drop both and request the whole file.
    Discard { reason: String },
}

/// Decides what to do with a response to a request for the bytes from `offset` on. `announced` is the size in the
/// metadata, `validator` the entity tag of the response that brought the bytes so far.
///
/// # Errors
/// [`HubError::Damaged`] if the size contradicts the metadata; [`HubError::InvalidResponse`] if the status is neither 200, 206 nor
/// 416.
pub(super) fn body_action(
    headers: &ContentHeaders,
    offset: u64,
    announced: Option<u64>,
    validator: Option<&str>,
) -> Result<BodyAction, HubError> {
    let discard = |reason: String| Ok(BodyAction::Discard { reason });
    match headers.status {
        200 => {
            let total = agree(announced, headers.content_length)?;
            Ok(BodyAction::Restart { total })
        }
        206 => {
            let Some((start, total)) = headers.content_range.as_deref().and_then(parse_content_range) else {
                return discard("partial content without a valid content-range header".to_owned());
            };
            if start != offset {
                return discard(format!("asked for the bytes from {offset} on, got those from {start} on"));
            }
            if let (Some(known), Some(new)) = (validator, headers.etag.as_deref())
                && known != new
            {
                return discard("the file changed during the download".to_owned());
            }
            let total = agree(announced, total)?;
            Ok(BodyAction::Append { total })
        }
        416 => discard(format!("no bytes from {offset} on")),
        status => Err(invalid(format!("status {status} instead of the content"))),
    }
}

fn agree(announced: Option<u64>, found: Option<u64>) -> Result<Option<u64>, HubError> {
    match (announced, found) {
        (Some(announced), Some(found)) if announced != found => {
            Err(HubError::Damaged(format!("the content has {found} bytes, the hub announced {announced}")))
        }
        (announced, found) => Ok(announced.or(found)),
    }
}

/// `bytes 5-9/10` -> (5, Some(10)); `bytes 5-9/*` -> (5, None).
fn parse_content_range(header: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = header.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (start, end) = range.split_once('-')?;
    let (start, end): (u64, u64) = (start.trim().parse().ok()?, end.trim().parse().ok()?);
    let total: Option<u64> = if total == "*" { None } else { Some(total.trim().parse().ok()?) };
    (start <= end && total.is_none_or(|total| end < total)).then_some((start, total))
}

/// A tag that `If-Range` accepts: strong and quoted (RFC 9110, section 13.1.5).
pub(super) fn strong_validator(etag: Option<&str>) -> Option<String> {
    etag.filter(|tag| tag.len() >= 2 && tag.starts_with('"') && tag.ends_with('"')).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    fn content(status: u16, length: Option<u64>, range: Option<&str>, etag: Option<&str>) -> ContentHeaders {
        ContentHeaders {
            status,
            content_length: length,
            content_range: range.map(str::to_owned),
            etag: etag.map(str::to_owned),
        }
    }

    #[test]
    fn a_matching_range_is_appended() {
        for validator in [None, Some("\"a\"")] {
            let headers = content(206, Some(6), Some("bytes 4-9/10"), Some("\"a\""));
            let action = body_action(&headers, 4, Some(10), validator).unwrap();
            assert_eq!(action, BodyAction::Append { total: Some(10) });
        }
    }

    // Finding L10 of docs/reliability.md: the start failed instead of downloading the whole file.
    #[test]
    fn an_ignored_range_restarts_and_a_refused_one_is_discarded() {
        let action = body_action(&content(200, Some(10), None, None), 4, Some(10), None).unwrap();
        assert_eq!(action, BodyAction::Restart { total: Some(10) });
        let action = body_action(&content(416, Some(0), None, None), 4, Some(10), None).unwrap();
        assert!(matches!(action, BodyAction::Discard { .. }));
    }

    #[test]
    fn a_wrong_range_or_a_changed_tag_is_discarded() {
        let wrong = [
            content(206, Some(10), Some("bytes 0-9/10"), None),
            content(206, Some(5), Some("bytes 5-9/10"), None),
            content(206, Some(6), Some("bytes 4-9/10"), Some("\"b\"")),
            content(206, Some(6), Some("bytes 4-99/10"), None),
            content(206, Some(6), Some("bytes 9-4/10"), None),
            content(206, Some(6), Some("lines 4-9/10"), None),
            content(206, Some(6), None, None),
        ];
        for headers in wrong {
            let action = body_action(&headers, 4, Some(10), Some("\"a\"")).unwrap();
            assert!(matches!(action, BodyAction::Discard { .. }), "{headers:?}");
        }
    }

    #[test]
    fn a_size_that_contradicts_the_metadata_is_an_error() {
        for headers in [content(200, Some(20), None, None), content(206, Some(6), Some("bytes 4-9/11"), None)] {
            let error = body_action(&headers, 4, Some(10), None).unwrap_err();
            assert!(error.to_string().contains("announced 10"), "{error}");
        }
    }

    // Finding D of docs/reliability.md: a commit header of a hostile hub became a path.
    #[test]
    fn metadata_with_a_hostile_commit_is_refused() {
        let headers = |commit: Option<&str>, etag: Option<&str>| FileHeaders {
            commit: commit.map(str::to_owned),
            etag: etag.map(str::to_owned),
            size: Some(1),
        };
        let pinned = Commit::parse(COMMIT).unwrap();
        assert_eq!(headers(Some(COMMIT), Some("\"x\"")).check(None).unwrap().commit, pinned);
        assert_eq!(headers(None, Some("\"x\"")).check(Some(&pinned)).unwrap().commit, pinned);
        for commit in [Some("../../x"), Some("/etc"), Some(""), None] {
            assert!(headers(commit, Some("\"x\"")).check(None).is_err(), "{commit:?}");
        }
        assert!(headers(Some(COMMIT), None).check(None).is_err());
        let other = Commit::parse(&"f".repeat(40)).unwrap();
        assert!(
            headers(Some(COMMIT), Some("\"x\"")).check(Some(&other)).is_err(),
            "a pinned commit is the one requested"
        );
    }

    #[test]
    fn only_strong_tags_validate_ranges() {
        assert_eq!(strong_validator(Some("\"a\"")), Some("\"a\"".to_owned()));
        for weak in [None, Some("W/\"a\""), Some("a"), Some("\"")] {
            assert_eq!(strong_validator(weak), None, "{weak:?}");
        }
    }
}
