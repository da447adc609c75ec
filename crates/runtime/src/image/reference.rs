//! Image names: `nginx` is `docker.io/library/nginx:latest`. The grammar and the defaults are those of the
//! distribution project, which every tool of the field shares.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

const DEFAULT_REGISTRY: &str = "docker.io";
/// Longest name without tag or digest.
const NAME_BYTES_MAX: usize = 255;
const TAG_BYTES_MAX: usize = 128;

/// A complete name: registry, repository, and a tag, a digest or both.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reference {
    pub registry: String,
    pub repository: String,
    pub tag: Option<String>,
    /// `sha256:…`.
    pub digest: Option<String>,
}

impl Reference {
    /// Registry and repository: `docker.io/library/nginx`.
    pub fn name(&self) -> String {
        format!("{}/{}", self.registry, self.repository)
    }

    /// The name with its tag, without its digest; `None` if it has no tag.
    pub fn tagged(&self) -> Option<String> {
        self.tag.as_ref().map(|tag| format!("{}:{tag}", self.name()))
    }

    /// The name with a digest, without its tag.
    pub fn with_digest(&self, digest: &str) -> String {
        format!("{}@{digest}", self.name())
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl FromStr for Reference {
    type Err = Error;

    /// Parses and normalises a name as users write it.
    fn from_str(text: &str) -> Result<Self> {
        let invalid = |why: &str| {
            Error::invalid(format!("couldn't parse image name \"{text}\": invalid reference format: {why}"))
        };
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) if is_digest(digest) => (rest, Some(digest.to_owned())),
            Some(_) => return Err(invalid("the digest must be sha256: and 64 hexadecimal digits")),
            None => (text, None),
        };
        // A colon after the last slash starts a tag; before it, a port.
        let (name, tag) = match rest.rfind(':') {
            Some(at) if !rest[at..].contains('/') => (&rest[..at], Some(&rest[at + 1..])),
            _ => (rest, None),
        };
        if let Some(tag) = tag
            && !is_tag(tag)
        {
            return Err(invalid("a tag is letters, digits, '_', '.' and '-', at most 128"));
        }
        let (registry, repository) = match name.split_once('/') {
            Some((first, rest)) if is_registry(first) => (first.to_owned(), rest.to_owned()),
            _ => (DEFAULT_REGISTRY.to_owned(), name.to_owned()),
        };
        let registry = if registry == "index.docker.io" { DEFAULT_REGISTRY.to_owned() } else { registry };
        let repository = if registry == DEFAULT_REGISTRY && !repository.contains('/') {
            format!("library/{repository}")
        } else {
            repository
        };
        if !repository.split('/').all(is_component) {
            let upper = repository.bytes().any(|byte| byte.is_ascii_uppercase());
            return Err(invalid(if upper {
                "repository name must be lowercase"
            } else {
                "a repository is lowercase letters and digits, separated by '.', '_', '-' or '/'"
            }));
        }
        if registry.len() + 1 + repository.len() > NAME_BYTES_MAX {
            return Err(invalid("repository name must not be more than 255 characters"));
        }
        let tag = match (tag, &digest) {
            (Some(tag), _) => Some(tag.to_owned()),
            (None, Some(_)) => None,
            (None, None) => Some("latest".to_owned()),
        };
        Ok(Self { registry, repository, tag, digest })
    }
}

/// `sha256:` and 64 lowercase hexadecimal digits.
pub fn is_digest(text: &str) -> bool {
    text.strip_prefix("sha256:").is_some_and(is_hex256)
}

/// 64 lowercase hexadecimal digits: an image id without its prefix.
pub fn is_hex256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

fn is_registry(part: &str) -> bool {
    let (host, port) = match part.rsplit_once(':') {
        Some((host, port)) if !host.ends_with(':') => (host, Some(port)),
        _ => (part, None),
    };
    let looks_like_host =
        part == "localhost" || host.contains('.') || port.is_some() || part.starts_with('[');
    let port_ok = port.is_none_or(|port| port.trim_end_matches(']').parse::<u16>().is_ok());
    let bytes_ok = part
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b':' | b'[' | b']'));
    let edge = |byte: Option<&u8>| {
        byte.is_some_and(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'[' | b']'))
    };
    let edges_ok = edge(host.as_bytes().first()) && edge(host.as_bytes().last()) && !host.contains("..");
    looks_like_host && port_ok && bytes_ok && edges_ok
}

/// Lowercase letters and digits in groups, between them one of `.`, `_`, `__` or any number of `-`.
fn is_component(part: &str) -> bool {
    let bytes = part.as_bytes();
    let word = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let (Some(first), Some(last)) = (bytes.first(), bytes.last()) else { return false };
    if !word(first) || !word(last) {
        return false;
    }
    part.split(|letter: char| letter.is_ascii_lowercase() || letter.is_ascii_digit())
        .all(|gap| matches!(gap, "" | "." | "_" | "__") || gap.bytes().all(|byte| byte == b'-'))
}

fn is_tag(tag: &str) -> bool {
    let ok = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
    !tag.is_empty() && tag.len() <= TAG_BYTES_MAX && tag.bytes().all(ok) && !tag.starts_with(['.', '-'])
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn names_are_completed() {
        let with_digest = format!("nginx@{DIGEST}");
        let cases = [
            ("nginx", "docker.io/library/nginx:latest"),
            ("nginx:1.27", "docker.io/library/nginx:1.27"),
            ("user/app", "docker.io/user/app:latest"),
            ("docker.io/nginx", "docker.io/library/nginx:latest"),
            ("index.docker.io/nginx", "docker.io/library/nginx:latest"),
            ("registry.example/a/b/c:v1", "registry.example/a/b/c:v1"),
            ("localhost/app", "localhost/app:latest"),
            ("localhost:5000/app:x", "localhost:5000/app:x"),
            ("127.0.0.1:5000/app", "127.0.0.1:5000/app:latest"),
            ("a__b/c-d.e--f", "docker.io/a__b/c-d.e--f:latest"),
            (&with_digest, &format!("docker.io/library/nginx@{DIGEST}")),
        ];
        for (text, want) in cases {
            assert_eq!(text.parse::<Reference>().unwrap().to_string(), want, "{text}");
        }
    }

    #[test]
    fn bad_names_are_refused_with_the_reason() {
        let long = "a".repeat(256);
        let cases = [
            ("", "invalid reference format"),
            ("UPPER", "must be lowercase"),
            ("a b", "invalid reference format"),
            ("nginx:", "a tag is"),
            ("nginx:-x", "a tag is"),
            ("nginx@sha256:abc", "the digest must be"),
            ("a//b", "invalid reference format"),
            ("../../etc/passwd", "invalid reference format"),
            (&long, "255"),
        ];
        for (text, want) in cases {
            let error = text.parse::<Reference>().unwrap_err();
            assert!(error.message.contains(want), "{text}: {error}");
        }
    }
}
