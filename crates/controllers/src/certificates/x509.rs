//! Certificates as bytes: reads what a request asks for and writes what the authority signs. The subject and the key
//! are copied as they stand in the request, of which a library for making one's own certificates knows only a part.

use super::Authority;
use base64::Engine;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use rcgen::{KeyPair, SigningKey};
use ring::rand::{SecureRandom, SystemRandom};
use std::net::IpAddr;
use x509_parser::certificate::X509Certificate;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::cri_attributes::ParsedCriAttribute;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::prelude::FromDer;
use x509_parser::x509::AttributeTypeAndValue;
use yasna::models::ObjectIdentifier;
use yasna::{DERWriter, DERWriterSeq, Tag, construct_der};

/// The usages a request may name: bits of the key usage, by name.
const KEY_USAGES: [(&str, u32); 10] = [
    ("signing", 0),
    ("digital signature", 0),
    ("content commitment", 1),
    ("key encipherment", 2),
    ("data encipherment", 3),
    ("key agreement", 4),
    ("cert sign", 5),
    ("crl sign", 6),
    ("encipher only", 7),
    ("decipher only", 8),
];

/// Extended usages by name.
const EXTENDED_USAGES: [(&str, &[u64]); 13] = [
    ("any", &[2, 5, 29, 37, 0]),
    ("server auth", &[1, 3, 6, 1, 5, 5, 7, 3, 1]),
    ("client auth", &[1, 3, 6, 1, 5, 5, 7, 3, 2]),
    ("code signing", &[1, 3, 6, 1, 5, 5, 7, 3, 3]),
    ("email protection", &[1, 3, 6, 1, 5, 5, 7, 3, 4]),
    ("s/mime", &[1, 3, 6, 1, 5, 5, 7, 3, 4]),
    ("ipsec end system", &[1, 3, 6, 1, 5, 5, 7, 3, 5]),
    ("ipsec tunnel", &[1, 3, 6, 1, 5, 5, 7, 3, 6]),
    ("ipsec user", &[1, 3, 6, 1, 5, 5, 7, 3, 7]),
    ("timestamping", &[1, 3, 6, 1, 5, 5, 7, 3, 8]),
    ("ocsp signing", &[1, 3, 6, 1, 5, 5, 7, 3, 9]),
    ("microsoft sgc", &[1, 3, 6, 1, 4, 1, 311, 10, 3, 3]),
    ("netscape sgc", &[2, 16, 840, 1, 113730, 4, 1]),
];

const BASIC_CONSTRAINTS: &[u64] = &[2, 5, 29, 19];
const KEY_USAGE: &[u64] = &[2, 5, 29, 15];
const EXTENDED_KEY_USAGE: &[u64] = &[2, 5, 29, 37];
const ALTERNATIVE_NAME: &[u64] = &[2, 5, 29, 17];
const AUTHORITY_KEY: &[u64] = &[2, 5, 29, 35];
/// A name without parts; then the alternative ones must not be ignored.
const EMPTY_SUBJECT: [u8; 2] = [0x30, 0];
/// GeneralizedTime from this year on, as RFC 5280 has it.
const LONG_YEARS_FROM: i16 = 2050;

/// What a request asks for. Its own signature was checked.
#[derive(Debug, Clone, Default)]
pub struct Request {
    pub common_name: String,
    pub organizations: Vec<String>,
    pub dns: Vec<String>,
    pub emails: Vec<String>,
    pub uris: Vec<String>,
    pub addresses: Vec<IpAddr>,
    /// As encoded in the request.
    subject: Vec<u8>,
    key: Vec<u8>,
}

impl Request {
    /// Reads the PEM of a request.
    pub fn parse(pem: &[u8]) -> Result<Request, String> {
        let wrong = || "PEM block type must be CERTIFICATE REQUEST".to_owned();
        let (_, block) = x509_parser::pem::parse_x509_pem(pem).map_err(|_| wrong())?;
        if block.label != "CERTIFICATE REQUEST" {
            return Err(wrong());
        }
        let (_, parsed) = X509CertificationRequest::from_der(&block.contents)
            .map_err(|error| format!("the request is not readable: {error}"))?;
        parsed
            .verify_signature()
            .map_err(|error| format!("the request's signature does not hold: {error}"))?;
        let info = &parsed.certification_request_info;
        let (common, organizations) = (info.subject.iter_common_name(), info.subject.iter_organization());
        let text = |value: &AttributeTypeAndValue<'_>| value.as_str().ok().map(str::to_owned);
        let mut request = Request {
            common_name: common.filter_map(text).last().unwrap_or_default(),
            organizations: organizations.filter_map(text).collect(),
            subject: info.subject.as_raw().to_vec(),
            key: info.subject_pki.raw.to_vec(),
            ..Default::default()
        };
        for attribute in info.iter_attributes() {
            let ParsedCriAttribute::ExtensionRequest(wish) = attribute.parsed_attribute() else { continue };
            for extension in &wish.extensions {
                if let ParsedExtension::SubjectAlternativeName(names) = extension.parsed_extension() {
                    names.general_names.iter().for_each(|name| request.add(name));
                }
            }
        }
        Ok(request)
    }

    /// Names of other kinds are not signed.
    fn add(&mut self, name: &GeneralName<'_>) {
        match name {
            GeneralName::DNSName(name) => self.dns.push((*name).to_owned()),
            GeneralName::RFC822Name(name) => self.emails.push((*name).to_owned()),
            GeneralName::URI(name) => self.uris.push((*name).to_owned()),
            GeneralName::IPAddress(bytes) => {
                let four = <[u8; 4]>::try_from(*bytes).map(IpAddr::from);
                let address = four.or_else(|_| <[u8; 16]>::try_from(*bytes).map(IpAddr::from));
                self.addresses.extend(address);
            }
            _ => {}
        }
    }
}

/// When a certificate ends, if it can be read.
pub fn ends(pem: &[u8]) -> Option<Timestamp> {
    let (_, block) = x509_parser::pem::parse_x509_pem(pem).ok()?;
    let (_, certificate) = x509_parser::parse_x509_certificate(&block.contents).ok()?;
    Timestamp::from_second(certificate.validity().not_after.timestamp()).ok()
}

/// Signs a request for the given usages and time; the authority's own end comes first. The answer is PEM.
pub fn sign(
    authority: &Authority,
    request: &Request,
    usages: &[String],
    from: Timestamp,
    until: Timestamp,
) -> Result<String, String> {
    let unreadable = |error: &dyn std::fmt::Display| format!("read the authority's certificate: {error}");
    let (_, block) = x509_parser::pem::parse_x509_pem(authority.certificate.as_bytes())
        .map_err(|error| unreadable(&error))?;
    let (_, issuer) =
        x509_parser::parse_x509_certificate(&block.contents).map_err(|error| unreadable(&error))?;
    let key =
        KeyPair::from_pem(&authority.key).map_err(|error| format!("read the authority's key: {error}"))?;
    let end = Timestamp::from_second(issuer.validity().not_after.timestamp()).unwrap_or(Timestamp::MAX);
    let extensions = extensions(request, usages, &issuer)?;
    let mut serial = [0; 16];
    SystemRandom::new().fill(&mut serial).map_err(|_| "no randomness for a serial number".to_owned())?;
    let algorithm = algorithm(&key)?;
    let unsigned = construct_der(|writer| {
        writer.write_sequence(|list| {
            list.next().write_tagged(Tag::context(0), |writer| writer.write_u8(2));
            list.next().write_bigint_bytes(&serial, true);
            list.next().write_der(&algorithm);
            list.next().write_der(issuer.subject().as_raw());
            list.next().write_sequence(|times| {
                times.next().write_der(&time(from));
                times.next().write_der(&time(until.min(end)));
            });
            list.next().write_der(&request.subject);
            list.next().write_der(&request.key);
            list.next().write_tagged(Tag::context(3), |writer| writer.write_der(&extensions));
        });
    });
    let signature = key.sign(&unsigned).map_err(|error| format!("sign the certificate: {error}"))?;
    let signed = construct_der(|writer| {
        writer.write_sequence(|list| {
            list.next().write_der(&unsigned);
            list.next().write_der(&algorithm);
            list.next().write_bitvec_bytes(&signature, signature.len() * 8);
        });
    });
    Ok(pem("CERTIFICATE", &signed))
}

/// What the certificate may be used for, for whom it is, and who signed it.
fn extensions(request: &Request, usages: &[String], issuer: &X509Certificate<'_>) -> Result<Vec<u8>, String> {
    let (key_usage, extended) = split(usages)?;
    let issuer_key = issuer.iter_extensions().find_map(|extension| match extension.parsed_extension() {
        ParsedExtension::SubjectKeyIdentifier(id) => Some(id.0.to_vec()),
        _ => None,
    });
    Ok(construct_der(|writer| {
        writer.write_sequence(|list| {
            if key_usage != 0 {
                extension(list.next(), KEY_USAGE, true, &bits(key_usage));
            }
            if !extended.is_empty() {
                let ids = sequence(|list| extended.iter().for_each(|id| list.next().write_oid(&oid(id))));
                extension(list.next(), EXTENDED_KEY_USAGE, false, &ids);
            }
            // Nobody's authority.
            extension(list.next(), BASIC_CONSTRAINTS, true, &sequence(|_| ()));
            if let Some(id) = &issuer_key {
                let id = sequence(|list| {
                    list.next().write_tagged_implicit(Tag::context(0), |writer| writer.write_bytes(id));
                });
                extension(list.next(), AUTHORITY_KEY, false, &id);
            }
            if let Some(names) = alternative_names(request) {
                extension(list.next(), ALTERNATIVE_NAME, request.subject == EMPTY_SUBJECT, &names);
            }
        });
    }))
}

fn sequence(write: impl FnOnce(&mut DERWriterSeq<'_>)) -> Vec<u8> {
    construct_der(|writer| writer.write_sequence(write))
}

fn pem(label: &str, der: &[u8]) -> String {
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let mut pem = format!("-----BEGIN {label}-----\n");
    for start in (0..text.len()).step_by(64) {
        pem.push_str(&text[start..text.len().min(start + 64)]);
        pem.push('\n');
    }
    pem.push_str(&format!("-----END {label}-----\n"));
    pem
}

/// Usages as bits and as identifiers.
fn split(usages: &[String]) -> Result<(u16, Vec<&'static [u64]>), String> {
    let (mut bits, mut extended, mut unknown) = (0, Vec::new(), Vec::new());
    for usage in usages {
        let bit = KEY_USAGES.iter().find(|known| known.0 == usage);
        let id = EXTENDED_USAGES.iter().find(|known| known.0 == usage);
        match (bit, id) {
            (Some((_, bit)), _) => bits |= 1 << bit,
            (_, Some((_, id))) if !extended.contains(id) => extended.push(*id),
            (_, Some(_)) => {}
            (None, None) => unknown.push(format!("{usage:?}")),
        }
    }
    if unknown.is_empty() {
        Ok((bits, extended))
    } else {
        Err(format!("unrecognized usage values: [{}]", unknown.join(" ")))
    }
}

/// A string of bits, the first bit first, without zeros at its end.
fn bits(set: u16) -> Vec<u8> {
    let count = 16 - set.leading_zeros() as usize;
    construct_der(|writer| {
        writer.write_bitvec_bytes(&set.reverse_bits().to_be_bytes()[..count.div_ceil(8)], count)
    })
}

fn extension(writer: DERWriter<'_>, id: &[u64], critical: bool, value: &[u8]) {
    writer.write_sequence(|list| {
        list.next().write_oid(&oid(id));
        if critical {
            list.next().write_bool(true);
        }
        list.next().write_bytes(value);
    });
}

fn alternative_names(request: &Request) -> Option<Vec<u8>> {
    let addresses = request.addresses.iter().map(|address| match address {
        IpAddr::V4(v4) => (7, v4.octets().to_vec()),
        IpAddr::V6(v6) => (7, v6.octets().to_vec()),
    });
    let texts = |tag: u64, names: &[String]| -> Vec<(u64, Vec<u8>)> {
        names.iter().map(|name| (tag, name.clone().into_bytes())).collect()
    };
    let mut names = texts(2, &request.dns);
    names.extend(texts(1, &request.emails));
    names.extend(addresses);
    names.extend(texts(6, &request.uris));
    let write = |list: &mut DERWriterSeq<'_>| {
        for (tag, name) in &names {
            list.next().write_tagged_implicit(Tag::context(*tag), |writer| writer.write_bytes(name));
        }
    };
    (!names.is_empty()).then(|| sequence(write))
}

/// The identifier of how `key` signs.
fn algorithm(key: &KeyPair) -> Result<Vec<u8>, String> {
    let of = key.algorithm();
    let (id, with_null): (&[u64], _) = if of == &rcgen::PKCS_ECDSA_P256_SHA256 {
        (&[1, 2, 840, 10045, 4, 3, 2], false)
    } else if of == &rcgen::PKCS_ECDSA_P384_SHA384 {
        (&[1, 2, 840, 10045, 4, 3, 3], false)
    } else if of == &rcgen::PKCS_ED25519 {
        (&[1, 3, 101, 112], false)
    } else if of == &rcgen::PKCS_RSA_SHA256 {
        (&[1, 2, 840, 113549, 1, 1, 11], true)
    } else {
        return Err(format!("the authority's key signs by {of:?}, which is not known here"));
    };
    Ok(construct_der(|writer| {
        writer.write_sequence(|list| {
            list.next().write_oid(&oid(id));
            if with_null {
                list.next().write_null();
            }
        });
    }))
}

fn oid(id: &[u64]) -> ObjectIdentifier {
    ObjectIdentifier::from_slice(id)
}

/// A time, in whole seconds, in the form RFC 5280 asks for.
fn time(at: Timestamp) -> Vec<u8> {
    let at = at.to_zoned(TimeZone::UTC);
    let (tag, format) =
        if at.year() < LONG_YEARS_FROM { (0x17, "%y%m%d%H%M%SZ") } else { (0x18, "%Y%m%d%H%M%SZ") };
    let text = at.strftime(format).to_string();
    // At most 15 letters: one byte tells the length.
    let mut der = vec![tag, text.len() as u8];
    der.extend_from_slice(text.as_bytes());
    der
}
