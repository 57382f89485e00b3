//! The certificate authorities that the HTTPS clients trust.

use std::sync::OnceLock;

use ureq::tls::{Certificate, RootCerts, TlsConfig};

/// Trusts the system's certificate store, or the certificates of `SSL_CERT_FILE` and `SSL_CERT_DIR` if one of them is set. If
/// these have no certificate, as in a minimal container, trusts Mozilla's list, which is built in. Reads them once per process.
pub(crate) fn client_config() -> TlsConfig {
    static ROOTS: OnceLock<RootCerts> = OnceLock::new();
    TlsConfig::builder().root_certs(ROOTS.get_or_init(system_roots).clone()).build()
}

fn system_roots() -> RootCerts {
    let found = rustls_native_certs::load_native_certs();
    for error in &found.errors {
        tracing::warn!("certificates of the system (SSL_CERT_FILE, SSL_CERT_DIR): {error}");
    }
    if found.certs.is_empty() {
        return RootCerts::WebPki;
    }
    found.certs.iter().map(|certificate| Certificate::from_der(certificate).to_owned()).into()
}

/// What to do about `error`, if a server's certificate is from an unknown authority; otherwise empty.
pub(crate) fn hint(error: &ureq::Error) -> &'static str {
    if error.to_string().contains("UnknownIssuer") {
        "; to trust a private certificate authority, set SSL_CERT_FILE to a PEM file with its certificate"
    } else {
        ""
    }
}
