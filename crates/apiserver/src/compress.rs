//! Large answers, packed for clients that ask for it.
//!
//! As upstream: gzip at its fastest, for bodies of known size above a threshold. Streams are never packed,
//! since an event must not wait in the packer for the next one.

use std::io::Write;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use flate2::Compression;
use flate2::write::GzEncoder;
use http::{HeaderMap, HeaderValue, header};
use http_body::{Body as _, Frame};
use http_body_util::BodyExt;

use crate::respond::{Answer, Body};

/// Smaller bodies travel faster than they pack.
pub const SIZE_MIN: u64 = 128 << 10;
/// How much is packed before others get their turn.
const STEP: usize = 64 << 10;

/// Does the client take gzip?
pub fn is_wanted(headers: &HeaderMap) -> bool {
    headers.get_all(header::ACCEPT_ENCODING).iter().filter_map(|v| v.to_str().ok()).any(|value| {
        value.split(',').any(|clause| {
            let mut parts = clause.split(';').map(str::trim);
            parts.next() == Some("gzip") && parts.all(|p| !matches!(p, "q=0" | "q=0.0"))
        })
    })
}

/// Packs the answer, if it is large and its size is known.
pub fn answer(answer: Answer) -> Answer {
    let large = answer.body().size_hint().exact().is_some_and(|size| size > SIZE_MIN);
    if !large || answer.headers().contains_key(header::CONTENT_ENCODING) {
        return answer;
    }
    let mut packed = answer.map(|inner| {
        let encoder = Some(GzEncoder::new(Vec::new(), Compression::fast()));
        Packed { inner, pending: Bytes::new(), encoder }.boxed_unsync()
    });
    packed.headers_mut().remove(header::CONTENT_LENGTH);
    packed.headers_mut().insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    packed.headers_mut().append(header::VARY, HeaderValue::from_static("Accept-Encoding"));
    packed
}

struct Packed {
    inner: Body,
    /// What came of the inner body and is not packed yet.
    pending: Bytes,
    /// Gone when the last bytes are out.
    encoder: Option<GzEncoder<Vec<u8>>>,
}

impl Packed {
    /// Packs at most one step of what is pending; the packed bytes, if enough came together.
    fn step(&mut self) -> std::io::Result<Option<Bytes>> {
        let Some(encoder) = &mut self.encoder else { return Ok(None) };
        let len = self.pending.len().min(STEP);
        encoder.write_all(&self.pending[..len])?;
        self.pending.advance(len);
        let out = encoder.get_mut();
        if out.len() < STEP / 4 {
            return Ok(None);
        }
        Ok(Some(std::mem::take(out).into()))
    }

    fn finish(&mut self) -> std::io::Result<Option<Bytes>> {
        let Some(encoder) = self.encoder.take() else { return Ok(None) };
        Ok(Some(encoder.finish()?.into()))
    }
}

impl http_body::Body for Packed {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, std::io::Error>>> {
        loop {
            while !self.pending.is_empty() {
                match self.step() {
                    Ok(None) => {}
                    Ok(Some(bytes)) => return Poll::Ready(Some(Ok(Frame::data(bytes)))),
                    Err(error) => return Poll::Ready(Some(Err(error))),
                }
            }
            if self.encoder.is_none() {
                return Poll::Ready(None);
            }
            match Pin::new(&mut self.inner).poll_frame(context) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Some(Err(error))),
                Poll::Ready(Some(Ok(frame))) => self.pending = frame.into_data().unwrap_or_default(),
                Poll::Ready(None) => {
                    let last = self.finish().transpose();
                    return Poll::Ready(last.map(|bytes| bytes.map(Frame::data)));
                }
            }
        }
    }
}
