//! Containers byte by byte, as nobody should write them: each field can be another one than it has to be.
//!
//! Used by the tests of malformed containers. Written from the facts of the format (docs/bfc.md), without the product's
//! writer.

/// An object with its index entry. What is `None` is what it has to be.
#[derive(Clone)]
pub struct Object {
    pub kind: u8,
    pub comp: u8,
    pub enc: u8,
    pub name: Vec<u8>,
    pub name_len: Option<u16>,
    pub mode: u32,
    pub orig_size: Option<u64>,
    pub crc: Option<u32>,
    pub content: Vec<u8>,
    pub index_path: Option<Vec<u8>>,
    pub index_path_len: Option<u32>,
    pub index_offset: Option<u64>,
    pub index_size: Option<u64>,
    pub index_mode: Option<u32>,
    pub index_kind_flags: Option<(u32, u32)>,
    pub index_orig_size: Option<u64>,
}

fn object(kind: u8, name: &[u8], mode: u32, content: &[u8]) -> Object {
    Object {
        kind,
        comp: 0,
        enc: 0,
        name: name.to_vec(),
        name_len: None,
        mode,
        orig_size: None,
        crc: None,
        content: content.to_vec(),
        index_path: None,
        index_path_len: None,
        index_offset: None,
        index_size: None,
        index_mode: None,
        index_kind_flags: None,
        index_orig_size: None,
    }
}

pub fn file(name: &str, content: &[u8]) -> Object {
    object(1, name.as_bytes(), 0o100_644, content)
}

pub fn folder(name: &str) -> Object {
    object(2, name.as_bytes(), 0o040_755, b"")
}

pub fn link(name: &str, target: &str) -> Object {
    object(3, name.as_bytes(), 0o120_777, target.as_bytes())
}

/// A file whose content is stored as `stored`, compressed, and has `orig_size` bytes.
pub fn packed(name: &str, stored: &[u8], content: &[u8], orig_size: u64) -> Object {
    Object { comp: 1, orig_size: Some(orig_size), crc: Some(crc(content)), ..file(name, stored) }
}

/// The whole of it.
#[derive(Clone)]
pub struct Raw {
    pub objects: Vec<Object>,
    pub features: u64,
    pub version: u32,
    pub count: Option<u32>,
    pub index_tail: Vec<u8>,
    pub footer_offset: Option<u64>,
    pub footer_size: Option<u64>,
}

pub fn raw(objects: Vec<Object>) -> Raw {
    Raw {
        objects,
        features: 3,
        version: 1,
        count: None,
        index_tail: Vec::new(),
        footer_offset: None,
        footer_size: None,
    }
}

/// Castagnoli's sum without inversions, bit by bit.
pub fn crc(data: &[u8]) -> u32 {
    data.iter().fold(0, |mut crc, byte| {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 };
        }
        crc
    })
}

fn pad(out: &mut Vec<u8>, from: usize) {
    let rest = (out.len() - from).next_multiple_of(16) + from;
    out.resize(rest, 0);
}

impl Raw {
    pub fn bytes(&self) -> Vec<u8> {
        let mut out = vec![0; 4096];
        let mut index = Vec::new();
        for o in &self.objects {
            let at = out.len();
            let orig = o.orig_size.unwrap_or(o.content.len() as u64);
            let crc = o.crc.unwrap_or_else(|| if o.kind == 2 { 0 } else { crc(&o.content) });
            out.extend([o.kind, o.comp, o.enc, 0]);
            out.extend(o.name_len.unwrap_or(o.name.len() as u16).to_le_bytes());
            out.extend([0, 0]);
            out.extend(o.mode.to_le_bytes());
            out.extend(7_u64.to_le_bytes());
            out.extend(orig.to_le_bytes());
            out.extend((o.content.len() as u64).to_le_bytes());
            out.extend(crc.to_le_bytes());
            out.extend(&o.name);
            pad(&mut out, at);
            let content_at = out.len();
            out.extend(&o.content);
            if o.kind == 3 {
                pad(&mut out, content_at);
            }
            let path = o.index_path.as_ref().unwrap_or(&o.name);
            index.extend(o.index_path_len.unwrap_or(path.len() as u32).to_le_bytes());
            index.extend(path);
            index.extend(o.index_offset.unwrap_or(at as u64).to_le_bytes());
            index.extend(o.index_size.unwrap_or((out.len() - at) as u64).to_le_bytes());
            index.extend(o.index_mode.unwrap_or(o.mode).to_le_bytes());
            index.extend(7_u64.to_le_bytes());
            let (comp, enc) = o.index_kind_flags.unwrap_or((o.comp.into(), o.enc.into()));
            index.extend(comp.to_le_bytes());
            index.extend(enc.to_le_bytes());
            index.extend(o.index_orig_size.unwrap_or(orig).to_le_bytes());
            index.extend(crc.to_le_bytes());
        }
        let count = self.count.unwrap_or(self.objects.len() as u32);
        let mut blob = [self.version.to_le_bytes(), count.to_le_bytes()].concat();
        blob.extend(index);
        blob.extend(&self.index_tail);
        let index_at = out.len() as u64;
        out.extend(&blob);
        out.extend(b"BFCFIDX\0");
        out.extend(self.footer_size.unwrap_or(blob.len() as u64).to_le_bytes());
        out.extend(crc(&blob).to_le_bytes());
        out.extend(self.footer_offset.unwrap_or(index_at).to_le_bytes());
        out.extend([0; 20]);
        out.extend(b"BFCFEND\0");
        out[..8].copy_from_slice(b"BFCFv1\0\0");
        out[12..16].copy_from_slice(&4096_u32.to_le_bytes());
        out[16..24].copy_from_slice(&self.features.to_le_bytes());
        let sum = crc(&out[12..4096]);
        out[8..12].copy_from_slice(&sum.to_le_bytes());
        out
    }
}
