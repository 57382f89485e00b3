//! HTTPS in front of a plain HTTP server, with a certificate of an authority that only this process knows.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use tempfile::TempDir;

/// Decrypts connections and passes them on.
pub(crate) struct TlsProxy {
    /// `https://localhost:PORT`
    pub(crate) url: String,
    folder: TempDir,
}

impl TlsProxy {
    /// Starts a proxy in front of the server at `address`, an IP address and a port.
    pub(crate) fn to(address: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut authority = CertificateParams::new([]).unwrap();
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let name = format!("Test authority {}", listener.local_addr().unwrap());
        authority.distinguished_name.push(DnType::CommonName, name);
        let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate().unwrap()).unwrap();
        let key = KeyPair::generate().unwrap();
        let certificate =
            CertificateParams::new(["localhost".to_owned()]).unwrap().signed_by(&key, &authority).unwrap();
        let config = ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key.into())
            .unwrap();

        let url = format!("https://localhost:{}", listener.local_addr().unwrap().port());
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("authority.pem"), authority.pem()).unwrap();
        let (config, address) = (Arc::new(config), address.to_owned());
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let tls = ServerConnection::new(Arc::clone(&config)).unwrap();
                let (client, address) = (StreamOwned::new(tls, client.unwrap()), address.clone());
                std::thread::spawn(move || forward(client, TcpStream::connect(address).unwrap()).ok());
            }
        });
        Self { url, folder }
    }

    /// A PEM file with the authority's certificate.
    pub(crate) fn authority(&self) -> PathBuf {
        self.folder.path().join("authority.pem")
    }
}

/// Passes bytes on in both directions until one side closes. Reads by turns, because a TLS stream cannot be split.
fn forward(mut client: StreamOwned<ServerConnection, TcpStream>, mut server: TcpStream) -> std::io::Result<()> {
    let turn = Some(Duration::from_millis(2));
    client.sock.set_read_timeout(turn)?;
    server.set_read_timeout(turn)?;
    while pass(&mut client, &mut server)? && pass(&mut server, &mut client)? {}
    client.conn.send_close_notify();
    client.flush()
}

/// Passes on what has arrived. Returns whether `from` is still open.
fn pass(from: &mut impl Read, to: &mut impl Write) -> std::io::Result<bool> {
    let mut buffer = [0; 16 << 10];
    match from.read(&mut buffer) {
        Ok(0) => Ok(false),
        Ok(count) => to.write_all(&buffer[..count]).and_then(|()| to.flush()).map(|()| true),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => Ok(true),
        Err(error) => Err(error),
    }
}
