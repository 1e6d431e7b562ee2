//! The send bytes of a row's values, without allocating: straight from the datum where that says it all,
//! through the type's send function otherwise.

use super::encoding;
use super::types::{Route, SendPlan};
use crate::error::{Error, Result};
use pg_dedup_record::canonical::Canonical;
use pgrx::pg_sys::{self, Datum};
use pgrx::varlena;
use std::ffi::c_char;

/// Room for the send bytes of one value that is not stored in the order it is sent in.
const CELL: usize = 32;

/// Where the send bytes of the current row's value are.
#[derive(Clone, Copy)]
enum Slot {
    Null,
    /// In the column's cell, that many bytes.
    Cell(usize),
    /// In the tuple, or in the scratch context.
    Elsewhere(*const u8, usize),
}

/// One column.
struct Sender {
    route: Route,
    /// The send function, looked up; zeroed if the route has none.
    function: pg_sys::FmgrInfo,
}

/// Turns rows of datums into rows of send bytes, one row at a time.
///
/// Memory that a row needs (detoasted values, results of send functions) comes from a context of its own and
/// is given back by [`FieldReader::clear`].
pub struct FieldReader {
    senders: Box<[Sender]>,
    canonicals: Box<[Canonical]>,
    cells: Box<[[u8; CELL]]>,
    slots: Vec<Slot>,
    /// The current row. The lifetime is a promise kept by this type: the slices are valid until `clear` or the
    /// next `read`, and [`FieldReader::fields`] lends them for no longer than that.
    fields: Vec<Option<&'static [u8]>>,
    scratch: pg_sys::MemoryContext,
    scratch_used: bool,
    utf8_database: bool,
    /// Does a route depend on `client_encoding`?
    needs_utf8_client: bool,
}

impl FieldReader {
    /// A reader for rows of these types, in this order.
    ///
    /// # Safety
    /// `home` is a memory context that outlives the reader.
    pub unsafe fn new(plans: Vec<SendPlan>, home: pg_sys::MemoryContext) -> FieldReader {
        // SAFETY: `home` is a live context by this function's contract; the name is a constant.
        let scratch = unsafe {
            pg_sys::AllocSetContextCreateExtended(
                home,
                c"dedup send bytes".as_ptr(),
                pg_sys::ALLOCSET_DEFAULT_MINSIZE as usize,
                pg_sys::ALLOCSET_DEFAULT_INITSIZE as usize,
                pg_sys::ALLOCSET_DEFAULT_MAXSIZE as usize,
            )
        };
        let utf8_database = encoding::database_is_utf8();
        let needs_utf8_client = plans.iter().any(|plan| {
            matches!(plan.route, Route::Function(_)) || !utf8_database && plan.route == Route::Text
        });
        let columns = plans.len();
        let (senders, canonicals): (Vec<_>, Vec<_>) = plans
            .into_iter()
            .map(|plan| {
                let mut function = pg_sys::FmgrInfo::default();
                if let Some(oid) = plan.route.function() {
                    // SAFETY: what the function caches goes to `home`, which outlives the reader.
                    unsafe { pg_sys::fmgr_info_cxt(oid, &mut function, home) };
                }
                (Sender { route: plan.route, function }, plan.canonical)
            })
            .unzip();
        FieldReader {
            senders: senders.into(),
            canonicals: canonicals.into(),
            cells: vec![[0; CELL]; columns].into(),
            slots: Vec::with_capacity(columns),
            fields: Vec::with_capacity(columns),
            scratch,
            scratch_used: false,
            utf8_database,
            needs_utf8_client,
        }
    }

    /// The canonical form of each column.
    pub fn canonicals(&self) -> &[Canonical] {
        &self.canonicals
    }

    /// The send bytes of the row read last, as a binary COPY would carry them; `None` is NULL.
    pub fn fields(&self) -> &[Option<&[u8]>] {
        &self.fields
    }

    /// Reads a row: `value(i)` is the datum of column `i`, `None` for NULL.
    ///
    /// # Errors
    /// 0A000 if text cannot be converted to UTF-8; ERRORs of send functions pass through.
    ///
    /// # Safety
    /// The datums are valid, of the types the reader was made for, and stay so until [`FieldReader::clear`].
    pub unsafe fn read(&mut self, value: impl Fn(usize) -> Option<Datum>) -> Result<()> {
        self.clear();
        if self.needs_utf8_client {
            // SAFETY: by this function's contract.
            encoding::with_utf8_client(|| unsafe { self.fill(value) })?;
        } else {
            // SAFETY: by this function's contract.
            unsafe { self.fill(value) }?;
        }
        for (slot, cell) in self.slots.iter().zip(&self.cells) {
            self.fields.push(match *slot {
                Slot::Null => None,
                // SAFETY: cells are boxed and not written before `clear` has emptied `fields`.
                Slot::Cell(length) => Some(unsafe { std::slice::from_raw_parts(cell.as_ptr(), length) }),
                Slot::Elsewhere(start, length) => {
                    // SAFETY: in a datum, valid until `clear` by this function's contract, or in the scratch
                    // context, which is reset there.
                    Some(unsafe { std::slice::from_raw_parts(start, length) })
                }
            });
        }
        Ok(())
    }

    /// Forgets the current row and gives its memory back.
    pub fn clear(&mut self) {
        self.fields.clear();
        self.slots.clear();
        if self.scratch_used {
            self.scratch_used = false;
            // SAFETY: the context is the reader's own, and nothing refers into it any more.
            unsafe { pg_sys::MemoryContextReset(self.scratch) };
        }
    }

    /// Fills `slots`, with the scratch context current.
    ///
    /// # Safety
    /// As for [`FieldReader::read`].
    unsafe fn fill(&mut self, value: impl Fn(usize) -> Option<Datum>) -> Result<()> {
        // An ERROR in between leaves the scratch context current; whoever catches it sets another, as after any
        // ERROR.
        // SAFETY: the reader's own context, as long-lived as the reader.
        let caller = unsafe { switch_context(self.scratch) };
        let mut outcome = Ok(());
        for column in 0..self.senders.len() {
            let slot = match value(column) {
                None => Ok(Slot::Null),
                // SAFETY: by this function's contract.
                Some(datum) => unsafe { self.send(column, datum) },
            };
            match slot {
                Ok(slot) => self.slots.push(slot),
                Err(error) => {
                    outcome = Err(error);
                    break;
                }
            }
        }
        // SAFETY: the context that was current before.
        unsafe { switch_context(caller) };
        outcome
    }

    /// The send bytes of one value.
    ///
    /// # Safety
    /// `datum` is a valid, non-null value of the column's type.
    unsafe fn send(&mut self, column: usize, datum: Datum) -> Result<Slot> {
        let route = self.senders[column].route;
        let cell = &mut self.cells[column];
        Ok(match route {
            Route::Word(width) => {
                let width = usize::from(width);
                let word = (datum.value() as u64).to_be_bytes();
                cell[..width].copy_from_slice(&word[8 - width..]);
                Slot::Cell(width)
            }
            Route::Uuid => Slot::Elsewhere(datum.cast_mut_ptr::<u8>(), 16),
            Route::Interval => {
                // SAFETY: an interval datum points at one.
                let interval = unsafe { datum.cast_mut_ptr::<pg_sys::Interval>().read_unaligned() };
                cell[..8].copy_from_slice(&interval.time.to_be_bytes());
                cell[8..12].copy_from_slice(&interval.day.to_be_bytes());
                cell[12..16].copy_from_slice(&interval.month.to_be_bytes());
                Slot::Cell(16)
            }
            Route::TimeTz => {
                // SAFETY: a timetz datum points at one.
                let time = unsafe { datum.cast_mut_ptr::<pg_sys::TimeTzADT>().read_unaligned() };
                cell[..8].copy_from_slice(&time.time.to_be_bytes());
                cell[8..12].copy_from_slice(&time.zone.to_be_bytes());
                Slot::Cell(12)
            }
            Route::Bytes => {
                // SAFETY: a bytea datum is a varlena.
                let payload = unsafe { self.payload(datum) };
                Slot::Elsewhere(payload.as_ptr(), payload.len())
            }
            Route::Text => {
                // SAFETY: a text datum is a varlena; so are the types that share its form.
                let payload = unsafe { self.payload(datum) };
                // Every server encoding has ASCII as its lower half: such text is UTF-8 already.
                if self.utf8_database || payload.is_ascii() {
                    Slot::Elsewhere(payload.as_ptr(), payload.len())
                } else {
                    self.convert(payload)
                }
            }
            Route::Numeric => {
                // SAFETY: a numeric datum is a varlena.
                let payload = unsafe { self.payload(datum) };
                match send_numeric(payload, &mut self.cells[column]) {
                    Some(length) => Slot::Cell(length),
                    // SAFETY: by this function's contract.
                    None => unsafe { self.call(column, datum) },
                }
            }
            // SAFETY: by this function's contract.
            Route::Function(_) => unsafe { self.call(column, datum) },
        })
    }

    /// The bytes of a varlena behind its header, fetched and decompressed if need be.
    ///
    /// # Safety
    /// `datum` is a varlena; the result is valid as long as it and the scratch context's content are.
    unsafe fn payload(&mut self, datum: Datum) -> &'static [u8] {
        let mut pointer = datum.cast_mut_ptr::<pg_sys::varlena>();
        // SAFETY: `pointer` is a varlena by this function's contract.
        if unsafe { varlena::varatt_is_1b_e(pointer) || varlena::varatt_is_4b_c(pointer) } {
            self.scratch_used = true;
            // SAFETY: as above; the copy goes to the scratch context, which is current.
            pointer = unsafe { pg_sys::pg_detoast_datum_packed(pointer) };
        }
        // SAFETY: a plain varlena now, with a short or a long header.
        unsafe {
            std::slice::from_raw_parts(
                varlena::vardata_any(pointer).cast(),
                varlena::varsize_any_exhdr(pointer),
            )
        }
    }

    /// Text that is not in UTF-8 yet.
    fn convert(&mut self, text: &[u8]) -> Slot {
        self.scratch_used = true;
        // SAFETY: reads `text.len()` bytes; a varlena is shorter than 2^30. The result is NUL-terminated and
        // palloc'd in the scratch context, which is current.
        unsafe {
            let converted = pg_sys::pg_server_to_any(
                text.as_ptr().cast::<c_char>(),
                text.len() as i32,
                pg_sys::pg_enc::PG_UTF8 as i32,
            );
            if converted.cast_const().cast() == text.as_ptr() {
                return Slot::Elsewhere(text.as_ptr(), text.len());
            }
            let converted = std::ffi::CStr::from_ptr(converted);
            Slot::Elsewhere(converted.as_ptr().cast(), converted.count_bytes())
        }
    }

    /// Through the type's send function.
    ///
    /// # Safety
    /// `datum` is a valid, non-null value of the column's type, and the route has a function.
    unsafe fn call(&mut self, column: usize, datum: Datum) -> Slot {
        self.scratch_used = true;
        // SAFETY: the function was looked up for this type; its result, a plain bytea, is palloc'd in the
        // scratch context, which is current.
        unsafe {
            let sent = pg_sys::SendFunctionCall(&mut self.senders[column].function, datum);
            Slot::Elsewhere(varlena::vardata_any(sent).cast(), varlena::varsize_any_exhdr(sent))
        }
    }
}

/// What `numeric_send` makes of a stored `numeric`: number of digits, weight, sign, display scale, digits, each
/// 16 bits. `None` for what does not fit the cell and for NaN and the infinities.
///
/// Stored (`numeric.c`, "numeric on disk") is one header word of which the high bits say: `00` positive and
/// `01` negative, scale in its low 14 bits, the weight in the next word; `10` short, with sign, scale and
/// weight packed as `s dddddd wwwwwww`; `11` special. Digits follow, in machine order.
fn send_numeric(stored: &[u8], cell: &mut [u8; CELL]) -> Option<usize> {
    let word = |at: usize| -> Option<u16> {
        Some(u16::from_ne_bytes([*stored.get(2 * at)?, *stored.get(2 * at + 1)?]))
    };
    let header = word(0)?;
    let (weight, sign, scale, digits_at) = match header >> 14 {
        0b11 => return None,
        0b10 => {
            let magnitude = (header & 0x003f) as i16;
            let weight = if header & 0x0040 != 0 { magnitude | !0x003f } else { magnitude };
            let sign = if header & 0x2000 != 0 { 0x4000 } else { 0 };
            (weight as u16, sign, (header & 0x1f80) >> 7, 1)
        }
        sign => (word(1)?, sign << 14, header & 0x3fff, 2),
    };
    let digits = stored.get(2 * digits_at..)?;
    let length = 8 + digits.len();
    if length > CELL || digits.len() % 2 != 0 {
        return None;
    }
    for (field, value) in cell[..8].chunks_exact_mut(2).zip([(digits.len() / 2) as u16, weight, sign, scale])
    {
        field.copy_from_slice(&value.to_be_bytes());
    }
    for (field, digit) in cell[8..length].chunks_exact_mut(2).zip(digits.chunks_exact(2)) {
        field.copy_from_slice(&u16::from_ne_bytes([digit[0], digit[1]]).to_be_bytes());
    }
    Some(length)
}

/// Makes `context` the current memory context; returns the one that was.
///
/// # Safety
/// `context` is live, and stays so until another one is made current.
pub unsafe fn switch_context(context: pg_sys::MemoryContext) -> pg_sys::MemoryContext {
    // SAFETY: what palloc.h does; backends have one thread.
    unsafe {
        let before = pg_sys::CurrentMemoryContext;
        pg_sys::CurrentMemoryContext = context;
        before
    }
}

/// A value whose send bytes contradict their type: a broken send function or broken data.
pub fn malformed(error: pg_dedup_record::canonical::CanonicalError) -> Error {
    Error::corrupted("the binary form of a value is malformed").detail(format!("{error}."))
}
