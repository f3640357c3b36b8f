/// What an operation or a device refuses, and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A buffer's length does not fit the dims it came with.
    #[error("{op}: {argument} has {got} elements where the dims ask for {expected}")]
    Length {
        /// Operation and pass, as `norm_relu_conv_forward`.
        op: &'static str,
        /// Name of the argument's field.
        argument: &'static str,
        /// Elements that the dims ask for.
        expected: usize,
        /// Elements that came.
        got: usize,
    },
    /// Dims that the operation does not support.
    #[error("{op}: {reason}")]
    Dims {
        /// Operation and pass.
        op: &'static str,
        /// What is wrong with them, with the numbers.
        reason: String,
    },
    /// The device has not this much memory left.
    #[error("out of memory: {bytes} bytes more were asked of {device}")]
    OutOfMemory {
        /// Size of the refused allocation.
        bytes: usize,
        /// Where it was asked.
        device: String,
    },
    /// A device that cannot be used: no driver, an old one, no such device, or one that was lost.
    #[error("{device}: {reason}")]
    Device {
        /// The device, or where it was looked for.
        device: String,
        /// What is wrong, and the way out.
        reason: String,
    },
    /// Kernels that the device's driver does not take.
    #[error("kernels {module}: {reason}")]
    Module {
        /// Name of the kernels' file, or of the kernel.
        module: String,
        /// What the driver says.
        reason: String,
    },
    /// A kernel that could not be queued, or that failed.
    #[error("kernel {kernel}: {reason}")]
    Launch {
        /// Its name.
        kernel: String,
        /// What the driver says.
        reason: String,
    },
}

/// Result of a kernel call.
pub type Result<T> = std::result::Result<T, Error>;

/// The length check that every contract is made of.
pub(crate) fn expect_len(op: &'static str, argument: &'static str, got: usize, expected: usize) -> Result<()> {
    if got == expected { Ok(()) } else { Err(Error::Length { op, argument, expected, got }) }
}

/// Refuses dims with a reason unless `ok`.
pub(crate) fn require(op: &'static str, ok: bool, reason: impl FnOnce() -> String) -> Result<()> {
    if ok { Ok(()) } else { Err(Error::Dims { op, reason: reason() }) }
}
