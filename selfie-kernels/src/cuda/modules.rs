//! The kernels as the program carries them: PTX, which `cuda/compile` makes of each `<op>.cu` and the driver compiles for
//! its GPU, once; it keeps what it compiled.

macro_rules! modules {
    ($($name:literal),+ $(,)?) => {
        /// Name and PTX of every kernel file.
        const MODULES: &[(&str, &str)] = &[$(($name, include_str!(concat!("../../cuda/ptx/", $name, ".ptx")))),+];
    };
}
modules! {
    "conformance",
    "conformance_sm90",
}

/// The PTX of `<module>.cu`.
pub(crate) fn image(module: &str) -> Option<&'static str> {
    MODULES.iter().find(|(name, _)| *name == module).map(|(_, ptx)| *ptx)
}
