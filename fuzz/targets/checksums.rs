//! Tar headers have a checksum, which no mutation would survive.

/// The same archive with the right checksum in every block that looks like a header.
pub fn repaired(tar: &[u8]) -> Vec<u8> {
    let mut tar = tar.to_vec();
    for header in tar.as_chunks_mut::<512>().0.iter_mut().filter(|header| header[257..262] == *b"ustar") {
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
    tar
}
