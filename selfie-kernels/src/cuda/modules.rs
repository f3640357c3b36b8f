//! The kernels as the program carries them, both made of each `<op>.cu` by `cuda/compile`: machine code for the generations
//! of GPUs that there are, and PTX, which the driver translates for any other one. That takes it seconds, once: it keeps
//! what it translated.

use super::driver::Facts;
use ruzstd::decoding::FrameDecoder;
use std::fmt;

/// A kernel file; zstd has compressed what is made of it.
#[derive(Debug, Clone, Copy)]
struct Module {
    name: &'static str,
    ptx: &'static [u8],
    /// Generation, and machine code for it.
    machine_code: &'static [(&'static str, &'static [u8])],
}

macro_rules! module {
    ($name:literal, $($generation:literal)*) => {
        Module {
            name: $name,
            ptx: include_bytes!(concat!("../../cuda/ptx/", $name, ".zst")),
            machine_code: &[$((
                $generation,
                include_bytes!(concat!("../../cuda/machine_code/", $generation, "/", $name, ".zst")),
            )),*],
        }
    };
}
macro_rules! for_all {
    ($($name:literal),+ $(,)?) => { &[$(module!($name, "sm_80" "sm_86" "sm_90a" "sm_100" "sm_120")),+] };
}
macro_rules! for_hopper {
    ($($name:literal),+ $(,)?) => { &[$(module!($name, "sm_90a")),+] };
}
#[cfg(test)]
macro_rules! as_ptx {
    ($($name:literal),+ $(,)?) => { &[$(module!($name,)),+] };
}

const MODULES: &[Module] = for_all![
    "attention",
    "augment",
    "backward_filter",
    "bn_commit",
    "bn_finalize",
    "contrast",
    "gemm",
    "grad_join",
    "norm_relu_conv_backward_data",
    "norm_relu_conv_forward",
    "norm_relu_pool",
    "residual_norm",
    "sgd",
    "softmax_cross_entropy",
    "stem_conv",
    "stem_pool",
    "tokens",
];
const HOPPER_MODULES: &[Module] = for_hopper![
    "backward_filter_sm90",
    "gemm_sm90",
    "norm_relu_conv_backward_data_sm90",
    "norm_relu_conv_forward_sm90",
    "stem_pool_sm90",
];
/// Those of the wrappers' own tests.
#[cfg(test)]
const TEST_MODULES: &[Module] = as_ptx!["conformance", "conformance_sm90"];
#[cfg(not(test))]
const TEST_MODULES: &[Module] = &[];

/// The smallest one: what becomes of it tells what the driver takes.
pub(crate) const SMALLEST: &str = "bn_commit";
pub(crate) const ITS_KERNEL: &str = "bn_commit";

/// Names of the kernel files that operations use on such a device.
pub(crate) fn names(facts: &Facts) -> impl Iterator<Item = &'static str> {
    let hopper = if facts.hopper { HOPPER_MODULES } else { &[] };
    MODULES.iter().chain(hopper).map(|module| module.name)
}

/// What a driver is given of a kernel file.
#[derive(Debug)]
pub(crate) enum Image {
    /// For the driver's GPU.
    MachineCode(Vec<u8>),
    /// For any one.
    Ptx(String),
}

/// How a kernel file got onto a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Form {
    /// As machine code of a generation, as `sm_90a`.
    MachineCode(&'static str),
    /// As PTX, which the driver translated, for this reason.
    Ptx(String),
    /// Compiled for the emulator.
    Emulated,
}

impl fmt::Display for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MachineCode(generation) => write!(f, "machine code for {generation}"),
            Self::Ptx(why) => write!(f, "PTX, which the driver translates, as {why}"),
            Self::Emulated => f.write_str("compiled for the emulator"),
        }
    }
}

/// The generation whose machine code runs on GPUs of this compute capability: that of the same major and no greater minor
/// number (CUDA C++ Programming Guide, "Binary Compatibility"), and of 9.0a on 9.0 alone. Those of systems on a chip, as
/// 8.7, are kinds of their own.
fn generation(capability: u32) -> Option<&'static str> {
    match capability {
        80 => Some("sm_80"),
        86 | 89 => Some("sm_86"),
        90 => Some("sm_90a"),
        100 | 103 => Some("sm_100"),
        120 | 121 => Some("sm_120"),
        _ => None,
    }
}

/// Offers `take` the images of `<name>.cu`, the best one first, until it takes one.
///
/// # Errors
/// There is no such file, or what `take` has against the last one, in words.
pub(crate) fn load<M>(
    name: &str,
    capability: u32,
    take: impl FnMut(Image) -> Result<M, String>,
) -> Result<(M, Form), String> {
    let mut modules = MODULES.iter().chain(HOPPER_MODULES).chain(TEST_MODULES);
    let module = modules.find(|module| module.name == name).ok_or("is not among this program's kernels")?;
    module.load(capability, take)
}

impl Module {
    fn load<M>(&self, capability: u32, mut take: impl FnMut(Image) -> Result<M, String>) -> Result<(M, Form), String> {
        let generation = generation(capability);
        let why = match self.machine_code.iter().find(|(of, _)| Some(*of) == generation) {
            None => format!("there is no machine code for compute capability {}.{}", capability / 10, capability % 10),
            Some((generation, code)) => match decompress(code).and_then(|code| take(Image::MachineCode(code))) {
                Ok(taken) => return Ok((taken, Form::MachineCode(generation))),
                Err(why) => format!("machine code for {generation} cannot be loaded: {why}"),
            },
        };
        let ptx = decompress(self.ptx).map(|text| String::from_utf8_lossy(&text).into_owned());
        match ptx.and_then(|ptx| take(Image::Ptx(ptx))) {
            Ok(taken) => Ok((taken, Form::Ptx(why))),
            Err(refused) => Err(format!("{refused} (as PTX, as {why})")),
        }
    }
}

/// What `cuda/compile` compressed.
fn decompress(compressed: &[u8]) -> Result<Vec<u8>, String> {
    // No file has a quarter of it: what asks for more is damaged.
    const MOST_BYTES: u64 = 16 << 20;
    let damaged = |why: &dyn fmt::Display| format!("this program is damaged, install it anew: {why}");
    let mut decoder = FrameDecoder::new();
    decoder.init(compressed).map_err(|e| damaged(&e))?;
    let bytes = decoder.content_size();
    if bytes > MOST_BYTES {
        return Err(damaged(&format_args!("{bytes} bytes")));
    }
    // All at once takes two thirds of the time that it takes block by block.
    let mut code = Vec::with_capacity(bytes as usize);
    decoder.decode_all_to_vec(compressed, &mut code).map_err(|e| damaged(&e))?;
    let [written, found] = [decoder.get_checksum_from_data(), decoder.get_calculated_checksum()];
    if written.is_none() || written != found {
        return Err(damaged(&"another checksum"));
    }
    Ok(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A driver that takes no machine code, or nothing.
    #[derive(Clone, Copy, PartialEq, Eq)]
    enum Refuses {
        Nothing,
        MachineCode,
        Everything,
    }

    /// How the smallest file is loaded by such a driver, and what it was offered.
    fn loaded(capability: u32, refuses: Refuses) -> (Result<Form, String>, Vec<&'static str>) {
        let mut offered = Vec::new();
        let form = load(SMALLEST, capability, |image| {
            let is_code = matches!(image, Image::MachineCode(_));
            offered.push(if is_code { "code" } else { "PTX" });
            match refuses {
                Refuses::MachineCode if is_code => Err("NO_BINARY_FOR_GPU".to_owned()),
                Refuses::Everything => Err("INVALID_IMAGE".to_owned()),
                _ => Ok(()),
            }
        });
        (form.map(|((), form)| form), offered)
    }

    #[test]
    fn machine_code_comes_first() {
        for (capability, generation) in [
            (80, "sm_80"),
            (86, "sm_86"),
            (89, "sm_86"),
            (90, "sm_90a"),
            (100, "sm_100"),
            (103, "sm_100"),
            (120, "sm_120"),
            (121, "sm_120"),
        ] {
            let (form, offered) = loaded(capability, Refuses::Nothing);
            assert_eq!((form, offered), (Ok(Form::MachineCode(generation)), vec!["code"]), "{capability}");
        }
    }

    #[test]
    fn a_driver_that_refuses_it_is_given_ptx() {
        let (form, offered) = loaded(90, Refuses::MachineCode);
        assert_eq!(form, Ok(Form::Ptx("machine code for sm_90a cannot be loaded: NO_BINARY_FOR_GPU".into())));
        assert_eq!(offered, ["code", "PTX"]);
        let (form, _) = loaded(90, Refuses::Everything);
        let said = form.expect_err("nothing was taken");
        assert!(said.starts_with("INVALID_IMAGE") && said.contains("sm_90a cannot be loaded: INVALID_IMAGE"), "{said}");
    }

    #[test]
    fn other_generations_are_given_ptx() {
        for capability in [87, 110, 130] {
            let (form, offered) = loaded(capability, Refuses::Nothing);
            assert!(matches!(&form, Ok(Form::Ptx(why)) if why.contains("no machine code")), "{capability}: {form:?}");
            assert_eq!(offered, ["PTX"], "{capability}");
        }
    }

    #[test]
    fn ptx_is_whole() {
        for module in MODULES.iter().chain(HOPPER_MODULES).chain(TEST_MODULES) {
            let text = decompress(module.ptx).unwrap_or_else(|why| panic!("{}: {why}", module.name));
            let text = String::from_utf8(text).expect("text");
            let target = if module.name.ends_with("_sm90") { ".target sm_90a" } else { ".target sm_80" };
            assert!(text.contains(target) && text.trim_end().ends_with('}'), "{}", module.name);
        }
        let module = Module { ptx: &MODULES[0].ptx[1..], ..MODULES[0] };
        let said = module.load(87, |_| Ok(())).expect_err("damaged");
        assert!(said.contains("damaged") && said.contains("no machine code"), "{said}");
    }

    #[test]
    fn damaged_machine_code_is_not_given() {
        let whole = MODULES[0].machine_code[0].1;
        let mut damages = vec![whole[..whole.len() - 1].to_vec(), whole[..whole.len() / 2].to_vec(), Vec::new()];
        // The frame's header, every part of what it holds, and the checksum.
        for at in (0..whole.len()).step_by(whole.len() / 40).chain([whole.len() - 1]) {
            let mut damaged = whole.to_vec();
            damaged[at] ^= 4;
            damages.push(damaged);
        }
        for (which, damaged) in damages.into_iter().enumerate() {
            let code: &'static [u8] = damaged.leak();
            let machine_code: &'static [_] = vec![("sm_80", code)].leak();
            let module = Module { machine_code, ..MODULES[0] };
            let form = module.load(80, |image| match image {
                Image::Ptx(_) => Ok(()),
                Image::MachineCode(_) => Err("was given".to_owned()),
            });
            let Ok(((), Form::Ptx(why))) = form else { panic!("damage {which}: {form:?}") };
            assert!(why.contains("damaged"), "damage {which}: {why}");
        }
    }

    /// The flags of an ELF file say for which GPU it is: in their lowest byte, from 10.0 on in the next one.
    #[test]
    fn machine_code_is_for_its_generation() {
        for module in MODULES.iter().chain(HOPPER_MODULES) {
            for (generation, compressed) in module.machine_code {
                let code = decompress(compressed).unwrap_or_else(|why| panic!("{}, {generation}: {why}", module.name));
                let number: u8 = generation.trim_matches(|c: char| !c.is_ascii_digit()).parse().expect("a number");
                let flags = &code[0x30..0x32];
                let said = if number < 100 { flags[0] } else { flags[1] };
                assert_eq!((&code[..4], said), (&b"\x7fELF"[..], number), "{}, {generation}", module.name);
            }
        }
    }

    /// So a driver says of its kernels, and only of these, that they may begin early. It stands in the flags, or from 10.0 on
    /// in a note of type 1000.
    #[test]
    fn machine_code_from_9_0_on_is_of_ptx_in_which_kernels_wait() {
        for module in MODULES.iter().chain(HOPPER_MODULES) {
            for (generation, compressed) in module.machine_code {
                let code = decompress(compressed).unwrap_or_else(|why| panic!("{}, {generation}: {why}", module.name));
                let note = |of: u8| [&[0xe8, 3, 0, 0][..], b"NVIDIA Corp\0", &[1, 0, of, 0]].concat();
                let has_note = |of: u8| code.windows(20).any(|bytes| bytes == note(of));
                let of = match *generation {
                    "sm_100" | "sm_120" => [80, 90].into_iter().find(|&of| has_note(of)),
                    _ => Some(code[0x32]),
                };
                let expected = if ["sm_80", "sm_86"].contains(generation) { 80 } else { 90 };
                assert_eq!(of, Some(expected), "{}, {generation}", module.name);
            }
        }
    }
}
