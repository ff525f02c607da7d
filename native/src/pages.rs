//! Giving pages of memory back to the system, and asking which are there.
//!
//! Only Linux says and does what is needed here: elsewhere both answer that they cannot.

use std::io;

/// Give back the whole pages in `[start, start + bytes)`; how many bytes, `None` where one cannot.
///
/// Whoever reads them again finds zeros.
///
/// # Safety
/// The range must lie in memory of this process that is private, anonymous and writable, and whose
/// contents nobody needs.
#[cfg(target_os = "linux")]
pub unsafe fn release(start: usize, bytes: usize) -> io::Result<Option<usize>> {
    let page = page_size();
    let first = start.next_multiple_of(page);
    let last = (start + bytes) / page * page;
    if first >= last {
        return Ok(Some(0));
    }
    // SAFETY: by the contract above.
    let done = unsafe {
        libc::madvise(
            first as *mut libc::c_void,
            last - first,
            libc::MADV_DONTNEED,
        )
    };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Some(last - first))
}

/// How many bytes of `[start, start + bytes)` lie in pages that are in memory.
#[cfg(target_os = "linux")]
pub fn resident(start: usize, bytes: usize) -> io::Result<Option<usize>> {
    if bytes == 0 {
        return Ok(Some(0));
    }
    let page = page_size();
    let first = start / page * page;
    let stop = start + bytes;
    let mut there = vec![0_u8; (stop - first).div_ceil(page)];
    // SAFETY: `mincore` only looks; the vector has a byte for each page.
    let done = unsafe {
        libc::mincore(
            first as *mut libc::c_void,
            stop - first,
            there.as_mut_ptr().cast(),
        )
    };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    let inside = |index: usize| {
        let (from, to) = (first + index * page, first + (index + 1) * page);
        to.min(stop) - from.max(start)
    };
    let pages = there
        .iter()
        .enumerate()
        .filter(|(_, state)| *state & 1 == 1);
    Ok(Some(pages.map(|(index, _)| inside(index)).sum()))
}

#[cfg(target_os = "linux")]
fn page_size() -> usize {
    // SAFETY: asks for a number.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}

/// Elsewhere nothing is given back.
///
/// # Safety
/// None is needed.
#[cfg(not(target_os = "linux"))]
pub unsafe fn release(_start: usize, _bytes: usize) -> io::Result<Option<usize>> {
    Ok(None)
}

/// Elsewhere nobody says.
#[cfg(not(target_os = "linux"))]
pub fn resident(_start: usize, _bytes: usize) -> io::Result<Option<usize>> {
    Ok(None)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn pages_inside_are_given_back_and_their_neighbours_stay() {
        let page = page_size();
        // large enough for the allocator to map it for itself
        let mut memory = vec![7_u8; 600 * page];
        let start = memory.as_mut_ptr() as usize;
        assert_eq!(resident(start, memory.len()).unwrap(), Some(memory.len()));
        let from = (start + 100 * page).next_multiple_of(page) - start - 10;
        // SAFETY: the memory is ours.
        let gone = unsafe { release(start + from, 300 * page + 20) }.unwrap();
        assert_eq!(gone, Some(300 * page));
        let left = resident(start, memory.len()).unwrap();
        assert_eq!(left, Some(memory.len() - 300 * page));
        assert!(memory[..from + 10].iter().all(|&byte| byte == 7));
        assert_eq!((memory[from + 10], memory[from + 10 + 300 * page]), (0, 7));
    }
}
