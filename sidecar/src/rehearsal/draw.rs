//! Which chunks a rehearsal reads.

use std::hash::{DefaultHasher, Hash, Hasher};

use crate::conn::Session;
use crate::error::Result;
use crate::plan::{self, PlannedChunk};
use crate::setup::Planned;

/// The chunks that are read, by table.
pub async fn draw(planned: &Planned, source: &Session, sample: f64) -> Result<Vec<(i32, PlannedChunk)>> {
    /// Chunks of a table that are drawn at least, where it is large enough for that many of [`SMALLEST`]: the fewer, the more chance there is.
    const FEWEST: u64 = 400;
    const SMALLEST: u64 = 32_000;
    let mut drawn = Vec::new();
    for (pair, chunks) in &planned.tables {
        let bytes: u64 = chunks.iter().map(|chunk| chunk.bytes).sum();
        let smaller = ((bytes as f64 * sample) as u64 / FEWEST).max(SMALLEST);
        let chosen = if sample >= 1.0 {
            chunks.clone()
        } else if chunks.iter().any(|chunk| chunk.bytes > smaller)
            && (chunks.len() as f64 * sample) < FEWEST as f64
        {
            let session =
                planned.snapshot_keeper.as_ref().filter(|_| pair.spec.key.is_empty()).unwrap_or(source);
            by_lot(&plan::plan_table(session, &pair.spec, &pair.source, smaller).await?, sample)
        } else {
            by_lot(chunks, sample)
        };
        drawn.extend(chosen.into_iter().map(|chunk| (pair.table_id, chunk)));
    }
    Ok(drawn)
}

/// So many of some chunks, in their order; the same ones each time.
fn by_lot(chunks: &[PlannedChunk], sample: f64) -> Vec<PlannedChunk> {
    let wanted = ((chunks.len() as f64 * sample).round() as usize).clamp(chunks.len().min(1), chunks.len());
    let lot = |index: usize| {
        let mut hasher = DefaultHasher::new();
        index.hash(&mut hasher);
        hasher.finish()
    };
    let mut indices: Vec<usize> = (0..chunks.len()).collect();
    indices.sort_by_key(|index| lot(*index));
    indices.truncate(wanted);
    indices.sort_unstable();
    indices.into_iter().map(|index| chunks[index].clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::{Range, RangeKind};

    #[test]
    fn lots_are_spread_over_the_table() {
        let range = Range { kind: RangeKind::Key, lower: None, upper: None };
        let chunks: Vec<PlannedChunk> =
            (0..1000).map(|n| PlannedChunk { range: range.clone(), records: n, bytes: 1 }).collect();
        let chosen =
            |of: &[PlannedChunk], sample| by_lot(of, sample).iter().map(|c| c.records).collect::<Vec<_>>();
        assert_eq!(chosen(&chunks, 1.0), (0..1000).collect::<Vec<_>>());
        let tenth = chosen(&chunks, 0.1);
        assert!(tenth.len() == 100 && tenth.is_sorted());
        for quarter in 0..4 {
            let drawn = tenth.iter().filter(|n| **n / 250 == quarter).count();
            assert!((10..40).contains(&drawn), "{drawn} of 100 in quarter {quarter}");
        }
        assert_eq!(chosen(&chunks[..5], 0.01).len(), 1);
        assert!(chosen(&[], 0.5).is_empty());
    }
}
