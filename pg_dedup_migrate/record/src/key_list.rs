//! The keys of a batch's rows, side by side in memory: reached by row number without touching the rows themselves.

/// Packed keys in row order. Memory a row: the key, and four bytes unless all keys are equally long.
#[derive(Debug, Default)]
pub(crate) struct KeyList {
    bytes: Vec<u8>,
    rows: usize,
    /// Where each key ends; empty as long as all are equally long.
    ends: Vec<usize>,
    width: usize,
}

impl KeyList {
    /// An empty list with room for `rows` short keys.
    pub(crate) fn with_capacity(rows: usize) -> KeyList {
        KeyList { bytes: Vec::with_capacity(rows * 8), ..KeyList::default() }
    }

    /// Appends the key that `write` appends to the buffer it is given.
    pub(crate) fn push_with<E>(
        &mut self,
        write: impl FnOnce(&mut Vec<u8>) -> Result<(), E>,
    ) -> Result<(), E> {
        let start = self.bytes.len();
        let outcome = write(&mut self.bytes);
        if outcome.is_err() {
            self.bytes.truncate(start);
        }
        let width = self.bytes.len() - start;
        if self.rows == 0 {
            self.width = width;
        } else if self.ends.is_empty() && width != self.width {
            self.ends = (1..=self.rows).map(|row| row * self.width).collect();
        }
        if !self.ends.is_empty() {
            self.ends.push(self.bytes.len());
        }
        self.rows += 1;
        outcome
    }

    /// The key of a row; empty where writing it failed.
    ///
    /// # Panics
    /// Beyond the rows pushed.
    pub(crate) fn get(&self, row: usize) -> &[u8] {
        if self.ends.is_empty() {
            return &self.bytes[row * self.width..(row + 1) * self.width];
        }
        let start = if row == 0 { 0 } else { self.ends[row - 1] };
        &self.bytes[start..self.ends[row]]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn keys_come_back_as_they_were_pushed(keys in prop::collection::vec(prop::option::of(prop::collection::vec(any::<u8>(), 0..5)), 0..40)) {
            let mut list = KeyList::with_capacity(keys.len());
            for key in &keys {
                let pushed = list.push_with(|out| {
                    out.extend_from_slice(key.as_deref().unwrap_or(b"left behind"));
                    key.as_ref().map(drop).ok_or(())
                });
                prop_assert_eq!(pushed.is_ok(), key.is_some());
            }
            for (row, key) in keys.iter().enumerate() {
                prop_assert_eq!(list.get(row), key.as_deref().unwrap_or_default());
            }
        }
    }
}
