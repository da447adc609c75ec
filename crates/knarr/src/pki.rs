//! The cluster's own certificates: an authority, and what it signs for servers and clients.
//!
//! Made at the first start, kept under `pki/`. Leaves that end within three months, or whose names no
//! longer fit the node, are made anew at every start.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;

use crate::settings::{write_private, write_unflushed};

const AUTHORITY_DAYS: i64 = 3650;
const LEAF_DAYS: i64 = 365;
/// Leaves are made anew when less than this is left.
const RENEW_DAYS: i64 = 90;

/// A certificate chain and its key, as PEM.
#[derive(Debug, Clone, PartialEq)]
pub struct Leaf {
    pub certificate: String,
    pub key: String,
}

/// Who a leaf is for.
pub struct Subject<'a> {
    pub name: &'a str,
    pub groups: &'a [&'a str],
    /// DNS names and addresses; a leaf with any serves, one without is a client.
    pub names: &'a [String],
    pub addresses: &'a [IpAddr],
}

/// Must clients show a certificate?
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Clients {
    Required,
    Optional,
}

/// The certificate authority of a cluster.
pub struct Authority {
    dir: PathBuf,
    certificate: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// Opens the authority in `dir`, making it if there is none.
    pub fn open(dir: &Path) -> Result<Authority> {
        fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
        let (certificate_path, key_path) = (dir.join("ca.crt"), dir.join("ca.key"));
        if !certificate_path.exists() || !key_path.exists() {
            let (certificate, key) = new_authority()?;
            write_private(&key_path, key.as_bytes())?;
            write_private(&certificate_path, certificate.as_bytes())?;
        }
        let read = |path: &Path| fs::read_to_string(path).with_context(|| format!("read {}", path.display()));
        let (certificate, key) = (read(&certificate_path)?, read(&key_path)?);
        let issuer = Issuer::from_ca_cert_pem(&certificate, KeyPair::from_pem(&key)?)?;
        Ok(Authority { dir: dir.to_owned(), certificate, issuer })
    }

    /// The authority's certificate, as PEM.
    pub fn certificate(&self) -> &str {
        &self.certificate
    }

    /// The authority's key, as PEM: for whoever signs on its behalf.
    pub fn key(&self) -> String {
        self.issuer.key().serialize_pem()
    }

    /// The leaf kept under `file`, made anew if it is missing, nearly over, or for other names.
    pub fn leaf(&self, file: &str, subject: &Subject) -> Result<Leaf> {
        let (certificate_path, key_path) =
            (self.dir.join(format!("{file}.crt")), self.dir.join(format!("{file}.key")));
        if let (Ok(certificate), Ok(key)) =
            (fs::read_to_string(&certificate_path), fs::read_to_string(&key_path))
            && still_fits(&certificate, &key, subject)
        {
            return Ok(Leaf { certificate, key });
        }
        let leaf = self.sign(subject)?;
        // Not flushed: what a power failure damages does not fit and is made anew.
        write_unflushed(&key_path, leaf.key.as_bytes())?;
        write_unflushed(&certificate_path, leaf.certificate.as_bytes())?;
        Ok(leaf)
    }

    fn sign(&self, subject: &Subject) -> Result<Leaf> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(subject.names.to_vec())?;
        params.subject_alt_names.extend(subject.addresses.iter().map(|a| SanType::IpAddress(*a)));
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, subject.name);
        for group in subject.groups {
            params.distinguished_name.push(DnType::OrganizationName, *group);
        }
        validity(&mut params, LEAF_DAYS)?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = match subject.names.is_empty() && subject.addresses.is_empty() {
            true => vec![ExtendedKeyUsagePurpose::ClientAuth],
            false => vec![ExtendedKeyUsagePurpose::ServerAuth],
        };
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok(Leaf { certificate: certificate.pem(), key: key.serialize_pem() })
    }

    /// The key that signs service account tokens: PKCS#8 PEM and the public point.
    pub fn token_key(&self) -> Result<(String, Vec<u8>)> {
        let path = self.dir.join("sa.key");
        if !path.exists() {
            write_private(&path, KeyPair::generate()?.serialize_pem().as_bytes())?;
        }
        let pem = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        let key = KeyPair::from_pem(&pem)?;
        Ok((pem, key.public_key_raw().to_vec()))
    }

    fn roots(&self) -> Result<RootCertStore> {
        let mut roots = RootCertStore::empty();
        roots.add(
            CertificateDer::from_pem_slice(self.certificate.as_bytes())
                .map_err(|e| anyhow!("ca.crt: {e}"))?,
        )?;
        Ok(roots)
    }

    /// Serves with the leaf; certificates that clients show are of this authority.
    pub fn server_config(
        &self,
        leaf: &Leaf,
        clients: Clients,
        protocols: &[&str],
    ) -> Result<Arc<rustls::ServerConfig>> {
        let verifier = WebPkiClientVerifier::builder(Arc::new(self.roots()?));
        let verifier = match clients {
            Clients::Required => verifier,
            Clients::Optional => verifier.allow_unauthenticated(),
        };
        let (chain, key) = parse(leaf)?;
        let mut config = rustls::ServerConfig::builder()
            .with_client_cert_verifier(verifier.build()?)
            .with_single_cert(chain, key)?;
        config.alpn_protocols = protocols.iter().map(|p| p.as_bytes().to_vec()).collect();
        Ok(Arc::new(config))
    }

    /// Calls servers of this authority, with the leaf as identity.
    pub fn client_config(&self, leaf: &Leaf) -> Result<Arc<rustls::ClientConfig>> {
        let (chain, key) = parse(leaf)?;
        let builder = rustls::ClientConfig::builder().with_root_certificates(self.roots()?);
        Ok(Arc::new(builder.with_client_auth_cert(chain, key)?))
    }
}

fn new_authority() -> Result<(String, String)> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, "knarr-ca");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages =
        vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
    validity(&mut params, AUTHORITY_DAYS)?;
    Ok((params.self_signed(&key)?.pem(), key.serialize_pem()))
}

/// From an hour ago, so that a slow clock elsewhere does no harm.
fn validity(params: &mut CertificateParams, days: i64) -> Result<()> {
    let at = |seconds: i64| -> Result<_> {
        let time = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(seconds);
        let date = time.to_zoned(jiff::tz::TimeZone::UTC).date();
        Ok(rcgen::date_time_ymd(date.year().into(), date.month() as u8, date.day() as u8))
    };
    params.not_before = at(-3600)?;
    params.not_after = at(days * 86_400)?;
    Ok(())
}

fn still_fits(pem: &str, key: &str, subject: &Subject) -> bool {
    let Ok(der) = CertificateDer::from_pem_slice(pem.as_bytes()) else { return false };
    let Ok((_, certificate)) = x509_parser::parse_x509_certificate(&der) else { return false };
    let Ok(key) = KeyPair::from_pem(key) else { return false };
    if certificate.public_key().subject_public_key.data != key.public_key_raw() {
        return false;
    }
    let left = certificate.validity().not_after.timestamp() - jiff::Timestamp::now().as_second();
    let names = match certificate.subject_alternative_name() {
        Ok(Some(names)) => names.value.general_names.len(),
        _ => 0,
    };
    let has = |name: &str| pem_names(&certificate).iter().any(|n| n == name);
    let all_named =
        subject.names.iter().all(|n| has(n)) && subject.addresses.iter().all(|a| has(&a.to_string()));
    left > RENEW_DAYS * 86_400 && all_named && names == subject.names.len() + subject.addresses.len()
}

fn pem_names(certificate: &x509_parser::certificate::X509Certificate) -> Vec<String> {
    use x509_parser::extensions::GeneralName;
    let Ok(Some(names)) = certificate.subject_alternative_name() else { return Vec::new() };
    names
        .value
        .general_names
        .iter()
        .filter_map(|name| match name {
            GeneralName::DNSName(name) => Some((*name).to_owned()),
            GeneralName::IPAddress(bytes) => match bytes.len() {
                4 => <[u8; 4]>::try_from(*bytes).ok().map(|b| IpAddr::from(b).to_string()),
                _ => <[u8; 16]>::try_from(*bytes).ok().map(|b| IpAddr::from(b).to_string()),
            },
            _ => None,
        })
        .collect()
}

fn parse(leaf: &Leaf) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)> {
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(leaf.certificate.as_bytes()).collect();
    let key =
        PrivateKeyDer::from_pem_slice(leaf.key.as_bytes()).map_err(|e| anyhow!("certificate key: {e}"))?;
    Ok((chain.map_err(|e| anyhow!("certificate: {e}"))?, key))
}
