//! The host names that requests may use on a loopback server without keys.

use std::net::IpAddr;

/// Allowed host names in addition to `localhost` and loopback addresses.
#[derive(Debug, Clone, Default)]
pub struct HostList(Vec<String>);

impl HostList {
    pub fn new(hosts: impl IntoIterator<Item = String>) -> Self {
        Self(hosts.into_iter().map(|host| host.to_ascii_lowercase()).collect())
    }

    /// Whether `host`, with or without a port, is localhost, a loopback address or on the list.
    pub(super) fn allows(&self, host: &str) -> bool {
        let name = without_port(host).to_ascii_lowercase();
        let is_loopback = name.trim_matches(['[', ']']).parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
        name == "localhost" || is_loopback || self.0.contains(&name)
    }
}

fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) && !name.ends_with(':') => name,
        _ => host,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_names_and_listed_hosts_are_allowed() {
        let hosts = HostList::new(["Rerank.example".to_owned()]);
        for allowed in
            ["localhost", "LOCALHOST:8080", "127.0.0.1:80", "127.1.2.3", "[::1]:8080", "::1", "rerank.example:443"]
        {
            assert!(hosts.allows(allowed), "{allowed}");
        }
        for refused in ["evil.example", "localhost.evil.example", "10.0.0.1", "null", "", "[::2]:80", "127.0.0.1.evil"]
        {
            assert!(!hosts.allows(refused), "{refused}");
        }
    }
}
