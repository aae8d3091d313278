//! Sparse files in tar archives: the old GNU form and the three that pax headers have.
//!
//! Called by the tar reader; part of it. Maps are capped and have to fit the file they are for.

use std::io::Read;

use tar::{GnuExtSparseHeader, GnuSparseHeader, Header};

use super::pax::decimal;
use super::tar::{BLOCK, Entry, Extensions, TarError, TarReader};

/// Most data runs in one sparse file.
const MAX_RUNS: usize = 1 << 18;

impl<R: Read> TarReader<R> {
    /// The old GNU form: the map is in the header and in blocks that follow it (not counted in the size).
    pub(super) fn gnu_sparse(&mut self, header: &Header, entry: &mut Entry) -> Result<(), TarError> {
        let gnu = header.as_gnu().ok_or_else(|| self.malformed("a sparse file without a GNU header"))?;
        let mut runs = Vec::new();
        self.add_runs(&gnu.sparse, &mut runs)?;
        let mut more = gnu.is_extended();
        while more {
            if runs.len() > MAX_RUNS {
                return Err(self.malformed("a sparse file with too many runs"));
            }
            let mut next = GnuExtSparseHeader::new();
            // Such blocks stand between header and data.
            self.fill_all(next.as_mut_bytes())?;
            self.add_runs(next.sparse(), &mut runs)?;
            more = next.is_extended();
        }
        entry.real_size = gnu.real_size().map_err(|e| self.malformed(e.to_string()))?;
        self.set_runs(entry, runs)
    }

    fn add_runs(&self, blocks: &[GnuSparseHeader], runs: &mut Vec<(u64, u64)>) -> Result<(), TarError> {
        for block in blocks.iter().filter(|b| !b.is_empty()) {
            let run = block.offset().and_then(|o| Ok((o, block.length()?)));
            runs.push(run.map_err(|e| self.malformed(e.to_string()))?);
        }
        Ok(())
    }

    /// The pax forms: 0.0 and 0.1 have the map in the pax header, 1.0 at the start of the data.
    pub(super) fn pax_sparse(&mut self, extensions: &Extensions, entry: &mut Entry) -> Result<(), TarError> {
        let real = extensions.pax("GNU.sparse.realsize").or_else(|| extensions.pax("GNU.sparse.size"));
        entry.real_size =
            real.and_then(decimal).ok_or_else(|| self.malformed("a sparse file without its real size"))?;
        if let Some(name) = extensions.pax("GNU.sparse.name") {
            entry.path = name.to_vec();
        }
        let mut runs = Vec::new();
        if extensions.pax("GNU.sparse.major") == Some(b"1") {
            let count = self.sparse_line()?;
            if count > MAX_RUNS as u64 {
                return Err(self.malformed("a sparse file with too many runs"));
            }
            for _ in 0..count {
                runs.push((self.sparse_line()?, self.sparse_line()?));
            }
            // The map fills whole blocks.
            let used = entry.size - self.left;
            let mut rest = vec![0; usize::try_from((BLOCK - used % BLOCK) % BLOCK).unwrap_or(0)];
            if (rest.len() as u64) > self.left {
                return Err(self.malformed("a sparse map does not fit into its file"));
            }
            self.left -= rest.len() as u64;
            self.fill_all(&mut rest)?;
            entry.size = self.left;
        } else if let Some(map) = extensions.pax("GNU.sparse.map") {
            let numbers: Option<Vec<u64>> = map.split(|b| *b == b',').map(decimal).collect();
            let numbers = numbers.filter(|n| n.len() % 2 == 0 && n.len() / 2 <= MAX_RUNS);
            let numbers = numbers.ok_or_else(|| self.malformed("a sparse map is malformed"))?;
            runs.extend(numbers.chunks_exact(2).map(|pair| (pair[0], pair[1])));
        } else {
            let all = |key: &str| {
                let values = extensions.pax.iter().filter(|(k, _)| k == key.as_bytes());
                values.map(|(_, v)| decimal(v)).collect::<Option<Vec<u64>>>()
            };
            let (offsets, lengths) = all("GNU.sparse.offset")
                .zip(all("GNU.sparse.numbytes"))
                .filter(|(o, l)| o.len() == l.len())
                .ok_or_else(|| self.malformed("a sparse map is malformed"))?;
            runs.extend(offsets.into_iter().zip(lengths));
        }
        self.set_runs(entry, runs)
    }

    /// One decimal number and a newline out of the entry's data.
    fn sparse_line(&mut self) -> Result<u64, TarError> {
        let mut text = Vec::with_capacity(21);
        let mut byte = [0];
        loop {
            if self.read_data(&mut byte)? == 0 || text.len() > 20 {
                return Err(self.malformed("a sparse map is malformed"));
            }
            if byte[0] == b'\n' {
                return decimal(&text).ok_or_else(|| self.malformed("a sparse map is malformed"));
            }
            text.push(byte[0]);
        }
    }

    fn set_runs(&self, entry: &mut Entry, runs: Vec<(u64, u64)>) -> Result<(), TarError> {
        let (mut end, mut total) = (0_u64, 0_u64);
        for (offset, length) in &runs {
            let next = offset.checked_add(*length).filter(|next| *offset >= end && *next <= entry.real_size);
            end = next.ok_or_else(|| self.malformed("a sparse file's runs overlap or leave the file"))?;
            total = total.saturating_add(*length);
        }
        if total != entry.size {
            return Err(self.malformed("a sparse file's runs do not add up to its data"));
        }
        entry.runs = Some(runs);
        Ok(())
    }
}
