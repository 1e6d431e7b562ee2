//! TLS by rustls, with libpq's meaning of `sslmode` and `sslrootcert`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::conninfo::{ConnInfo, SslMode};
use crate::error::{Error, Result};

/// How far a server's certificate is checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Check {
    /// Encryption only.
    Nothing,
    /// Signed by a known authority.
    Authority,
    /// And for the host that was asked for.
    AuthorityAndHost,
}

/// What makes the encrypted connections of one endpoint.
pub fn connector(info: &ConnInfo) -> Result<MakeRustlsConnect> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let home = std::env::var_os("HOME").map(PathBuf::from);
    let in_home = |name: &str| {
        home.as_ref().map(|home| home.join(".postgresql").join(name)).filter(|path| path.exists())
    };
    let root_file = match info.get("sslrootcert") {
        Some("") | None => in_home("root.crt"),
        Some(path) => Some(PathBuf::from(path)),
    };
    let check = check_of(info.ssl_mode()?, root_file.is_some());
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|e| tls_error("no usable protocol version").because(e))?;
    let builder = match check {
        Check::Nothing => builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Lenient { authority: None, provider })),
        Check::Authority => {
            let inner = WebPkiServerVerifier::builder_with_provider(
                Arc::new(roots(root_file.as_deref())?),
                provider.clone(),
            )
            .build()
            .map_err(|e| tls_error("no usable root certificate").because(e))?;
            builder
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(Lenient { authority: Some(inner), provider }))
        }
        Check::AuthorityAndHost => builder.with_root_certificates(roots(root_file.as_deref())?),
    };
    let file = |key: &str, name: &str| {
        info.get(key).filter(|path| !path.is_empty()).map(PathBuf::from).or_else(|| in_home(name))
    };
    let config = match (file("sslcert", "postgresql.crt"), file("sslkey", "postgresql.key")) {
        (Some(certificate), Some(key)) => builder
            .with_client_auth_cert(certificates(&certificate)?, private_key(&key)?)
            .map_err(|e| tls_error("the client certificate and key can't be used").because(e))?,
        _ => builder.with_no_client_auth(),
    };
    Ok(MakeRustlsConnect::new(config))
}

/// libpq checks the authority under `require` too once a root certificate is there.
fn check_of(mode: SslMode, has_root_file: bool) -> Check {
    match mode {
        SslMode::Disable | SslMode::Prefer => Check::Nothing,
        SslMode::Require if has_root_file => Check::Authority,
        SslMode::Require => Check::Nothing,
        SslMode::VerifyCa => Check::Authority,
        SslMode::VerifyFull => Check::AuthorityAndHost,
    }
}

/// The authorities of the file, or the system's without a file or with `sslrootcert=system`.
fn roots(file: Option<&Path>) -> Result<RootCertStore> {
    let mut store = RootCertStore::empty();
    match file {
        Some(path) if path != Path::new("system") => {
            for certificate in certificates(path)? {
                store.add(certificate).map_err(|e| tls_error(&format!("{}: {e}", path.display())))?;
            }
        }
        _ => {
            store.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
    }
    if store.is_empty() {
        return Err(tls_error("no root certificate was found").hint("name one with sslrootcert=FILE"));
    }
    Ok(store)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .map_err(|e| tls_error(&format!("can't read certificates from {}: {e}", path.display())))
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>> {
    PrivateKeyDer::from_pem_file(path)
        .map_err(|e| tls_error(&format!("can't read the key in {}: {e}", path.display())))
}

fn tls_error(what: &str) -> Error {
    Error::usage(format!("TLS: {what}"))
}

/// Checks less than rustls does by default: the authority without the host name, or nothing.
#[derive(Debug)]
struct Lenient {
    authority: Option<Arc<WebPkiServerVerifier>>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Lenient {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        use rustls::CertificateError::{NotValidForName, NotValidForNameContext};
        let Some(authority) = &self.authority else { return Ok(ServerCertVerified::assertion()) };
        match authority.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now) {
            // The name is looked at last, so the chain was good.
            Err(rustls::Error::InvalidCertificate(NotValidForName | NotValidForNameContext { .. })) => {
                Ok(ServerCertVerified::assertion())
            }
            result => result,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_check_what_libpq_checks() {
        assert_eq!(check_of(SslMode::Prefer, true), Check::Nothing);
        assert_eq!(check_of(SslMode::Require, false), Check::Nothing);
        assert_eq!(check_of(SslMode::Require, true), Check::Authority);
        assert_eq!(check_of(SslMode::VerifyCa, false), Check::Authority);
        assert_eq!(check_of(SslMode::VerifyFull, false), Check::AuthorityAndHost);
    }

    #[test]
    fn a_missing_root_file_is_an_error() {
        let info = ConnInfo::parse("host=h sslmode=verify-full sslrootcert=/no/such/file").unwrap();
        assert!(connector(&info).is_err());
        assert!(connector(&ConnInfo::parse("host=h sslmode=require").unwrap()).is_ok());
    }
}
