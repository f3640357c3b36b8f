//! What of this machine a process may use: memory, and threads that compute.
//!
//! In a container the machine is larger than what one gets: control groups (Docker, Kubernetes, Slurm, systemd) limit
//! memory, and end without a word who takes more, and they limit the time of processors. Both versions of them are read,
//! and of a group and those above it the least counts. All of it comes from files below a root, so that tests have
//! machines of their own.
//!
//! Source: the kernel's `admin-guide/cgroup-v1/memory.rst`, `admin-guide/cgroup-v2.rst`, `scheduler/sched-bwc.rst`,
//! `proc_pid_mountinfo(5)`.

use std::fmt;
use std::fs;
use std::path::{Component, Path, PathBuf};

/// What sets a limit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// The machine itself.
    Machine,
    /// The processors that this process may run on (`taskset`, a set of a control group).
    Affinity,
    /// A control group: the file that says so.
    ControlGroup(PathBuf),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Machine => write!(f, "the machine"),
            Source::Affinity => write!(f, "the processors that this process may run on"),
            Source::ControlGroup(file) => write!(f, "the control group of this process ({})", file.display()),
        }
    }
}

/// A number, and what sets it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limit<N> {
    /// How much there is.
    pub most: N,
    /// Who says so.
    pub source: Source,
}

/// What this process may use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct System {
    /// The processor's name.
    pub cpu: String,
    /// Processors of the machine.
    pub processors: usize,
    /// Threads that can run at once, at least 1: what `--threads 0` takes.
    pub threads: Limit<usize>,
    /// Bytes of memory; none where the system does not say.
    pub memory: Option<Limit<u64>>,
}

impl System {
    /// This machine, now.
    pub fn here() -> Self {
        // Where there are no such files, as on macOS, the standard library knows the processors.
        let known = std::thread::available_parallelism().map_or(1, usize::from);
        Self::below(Path::new("/"), known)
    }

    /// The machine whose `proc` and `sys` lie below `root`; `known` is what else is known of its processors.
    pub fn below(root: &Path, known: usize) -> Self {
        let info = read(&root.join("proc/cpuinfo"));
        let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
        let cpu =
            name.map_or_else(|| format!("{} processor", std::env::consts::ARCH), |(_, name)| name.trim().to_string());
        let listed = info.lines().filter(|line| line.split(':').next().map(str::trim) == Some("processor")).count();
        let processors = if listed > 0 { listed } else { known };

        let groups = Groups::of_process(root);
        let allowed = status(root, "Cpus_allowed_list:").and_then(|list| count(&list));
        let mut threads = Limit { most: processors, source: Source::Machine };
        let affinity = allowed.map(|most| Limit { most, source: Source::Affinity });
        for limit in affinity.into_iter().chain(groups.threads()) {
            // Part of a processor's time is one thread.
            threads = least(threads, Limit { most: limit.most.max(1), ..limit });
        }
        let machine = kilobytes(&read(&root.join("proc/meminfo")), "MemTotal:");
        let machine = machine.map(|most| Limit { most, source: Source::Machine });
        let memory = machine.into_iter().chain(groups.memory()).reduce(least);
        Self { cpu, processors, threads, memory }
    }
}

/// The most memory that this process has held, where it is known.
pub fn peak_bytes() -> Option<u64> {
    kilobytes(&read(Path::new("/proc/self/status")), "VmHWM:")
}

/// The memory that this process holds now and that is no copy of a file, where it is known.
pub fn held_bytes() -> Option<u64> {
    kilobytes(&read(Path::new("/proc/self/status")), "RssAnon:")
}

/// Whether this process was started with the signal of that number ignored, as `nohup` does with 1; where that is not
/// known, no.
pub fn ignores_signal(number: u32) -> bool {
    let mask = status(Path::new("/"), "SigIgn:").and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> number.saturating_sub(1) & 1 == 1)
}

/// The lesser of two limits; of equal ones, the first.
fn least<N: PartialOrd>(one: Limit<N>, other: Limit<N>) -> Limit<N> {
    if other.most < one.most { other } else { one }
}

/// A file's text; nothing where it cannot be read.
fn read(path: &Path) -> String {
    fs::read(path).map_or_else(|_| String::new(), |text| String::from_utf8_lossy(&text).into_owned())
}

/// A line of `/proc/self/status`, without its name.
fn status(root: &Path, name: &str) -> Option<String> {
    read(&root.join("proc/self/status")).lines().find_map(|line| Some(line.strip_prefix(name)?.trim().to_string()))
}

/// A line such as `VmHWM: 1234 kB`, in bytes.
fn kilobytes(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

/// The numbers in a list such as `0-2,5`; none for a list of none.
fn count(list: &str) -> Option<usize> {
    let mut sum = 0usize;
    for range in list.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        sum = sum.checked_add(last.checked_sub(first)?.checked_add(1)?)?;
    }
    (sum > 0).then_some(sum)
}

/// The version of control groups that a hierarchy is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

/// One hierarchy of control groups, and the folders of this process's group and of those above it, lowest first.
#[derive(Debug)]
struct Hierarchy {
    version: Version,
    /// Of version 1, such as `memory` or `cpu`.
    controllers: Vec<String>,
    folders: Vec<PathBuf>,
}

/// The control groups of this process.
#[derive(Debug)]
struct Groups(Vec<Hierarchy>);

impl Groups {
    fn of_process(root: &Path) -> Self {
        let (memberships, mounts) = (read(&root.join("proc/self/cgroup")), read(&root.join("proc/self/mountinfo")));
        Self(mounts.lines().filter_map(|line| Mount::parse(line)?.hierarchy(root, &memberships)).collect())
    }

    /// The hierarchies with a controller; all those of version 2, which has one.
    fn of<'a>(&'a self, controller: &'a str) -> impl Iterator<Item = &'a Hierarchy> {
        let has = move |group: &&Hierarchy| {
            group.version == Version::Two || group.controllers.iter().any(|known| known == controller)
        };
        self.0.iter().filter(has)
    }

    /// All limits on memory.
    fn memory(&self) -> Vec<Limit<u64>> {
        let mut limits = Vec::new();
        let mut add = |file: PathBuf, most: Option<u64>| {
            limits.extend(most.map(|most| Limit { most, source: Source::ControlGroup(file) }));
        };
        for group in self.of("memory") {
            for folder in &group.folders {
                match group.version {
                    Version::Two => {
                        let file = folder.join("memory.max");
                        let most = read(&file).trim().parse().ok();
                        add(file, most);
                    }
                    Version::One => {
                        let (file, stat) = (folder.join("memory.limit_in_bytes"), folder.join("memory.stat"));
                        let most = read(&file).trim().parse().ok();
                        add(file, most);
                        // The kernel's own answer sees the groups above a container, too.
                        let text = read(&stat);
                        let line = text.lines().find_map(|line| line.strip_prefix("hierarchical_memory_limit "));
                        add(stat, line.and_then(|bytes| bytes.trim().parse().ok()));
                        // Those above do not count where they are told not to.
                        if read(&folder.join("memory.use_hierarchy")).trim() == "0" {
                            break;
                        }
                    }
                }
            }
        }
        limits
    }

    /// All limits on the time of processors, in whole ones: of one and a half, one would wait for the other.
    fn threads(&self) -> Vec<Limit<usize>> {
        let mut limits = Vec::new();
        for group in self.of("cpu") {
            for folder in &group.folders {
                let (file, quota) = match group.version {
                    Version::Two => {
                        let file = folder.join("cpu.max");
                        let text = read(&file);
                        (file, text)
                    }
                    Version::One => {
                        let file = folder.join("cpu.cfs_quota_us");
                        let text = read(&file) + " " + &read(&folder.join("cpu.cfs_period_us"));
                        (file, text)
                    }
                };
                // `max 100000` and `-1 100000` are no limits.
                let mut numbers = quota.split_whitespace().map(str::parse::<u64>);
                if let (Some(Ok(quota)), Some(Ok(period))) = (numbers.next(), numbers.next())
                    && let Some(most) = quota.checked_div(period)
                {
                    let most = usize::try_from(most).unwrap_or(usize::MAX);
                    limits.push(Limit { most, source: Source::ControlGroup(file) });
                }
            }
        }
        limits
    }
}

/// A line of `/proc/self/mountinfo` about control groups.
#[derive(Debug)]
struct Mount {
    version: Version,
    controllers: Vec<String>,
    /// The part of the hierarchy that is mounted.
    part: PathBuf,
    /// Where.
    point: PathBuf,
}

impl Mount {
    /// `36 25 0:31 /part /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory`; none for other file systems.
    fn parse(line: &str) -> Option<Self> {
        let (before, after) = line.split_once(" - ")?;
        let mut after = after.split(' ');
        let version = match after.next()? {
            "cgroup" => Version::One,
            "cgroup2" => Version::Two,
            _ => return None,
        };
        let controllers = after.nth(1).unwrap_or_default().split(',').map(String::from).collect();
        let mut fields = before.split(' ').skip(3);
        Some(Self { version, controllers, part: unescaped(fields.next()?), point: unescaped(fields.next()?) })
    }

    /// The folders of the process's group in it, up to where it is mounted. `memberships` is `/proc/self/cgroup`.
    fn hierarchy(self, root: &Path, memberships: &str) -> Option<Hierarchy> {
        let group = memberships.lines().find_map(|line| {
            // `4:memory:/path`, in version 2 `0::/path`.
            let (_, rest) = line.split_once(':')?;
            let (controllers, path) = rest.split_once(':')?;
            let ours = match self.version {
                Version::Two => controllers.is_empty(),
                Version::One => {
                    controllers.split(',').any(|one| !one.is_empty() && self.controllers.iter().any(|c| c == one))
                }
            };
            ours.then_some(path)
        })?;
        let below = |path: &Path| root.join(path.strip_prefix("/").unwrap_or(path));
        // A group that is not in the part that is mounted is seen from outside of a container: its own is at the top.
        let inside = Path::new(group).strip_prefix(&self.part).unwrap_or(Path::new(""));
        let inside = if inside.components().any(|part| part == Component::ParentDir) { Path::new("") } else { inside };
        let folders = inside.ancestors().map(|folder| below(&self.point).join(folder)).collect();
        Some(Hierarchy { version: self.version, controllers: self.controllers, folders })
    }
}

/// A path in which spaces and the like are written as `\040`.
fn unescaped(field: &str) -> PathBuf {
    let mut parts = field.split('\\');
    let mut text = parts.next().unwrap_or_default().to_string();
    for part in parts {
        match part.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok()).zip(part.get(3..)) {
            Some((byte, rest)) => {
                text.push(char::from(byte));
                text.push_str(rest);
            }
            None => {
                text.push('\\');
                text.push_str(part);
            }
        }
    }
    text.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;
    const MIB: u64 = 1 << 20;

    /// A machine of four processors and 8 GiB, with these files beside.
    fn machine(files: &[(&str, &str)]) -> (System, tempfile::TempDir) {
        let root = tempfile::tempdir().expect("a temporary folder");
        let common = [
            ("proc/meminfo", "MemTotal:        8388608 kB\nMemFree:          100 kB\n"),
            (
                "proc/cpuinfo",
                "processor\t: 0\nmodel name\t: Toy 9\n\nprocessor\t: 1\n\nprocessor\t: 2\n\nprocessor\t: 3\n",
            ),
            ("proc/self/status", "Name:\tselfie\nCpus_allowed_list:\t0-3\n"),
        ];
        for (name, text) in common.iter().chain(files) {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().expect("below the root")).expect("a folder");
            fs::write(path, text).expect("written");
        }
        (System::below(root.path(), 7), root)
    }

    fn memory(files: &[(&str, &str)]) -> (u64, Source) {
        let (system, root) = machine(files);
        let limit = system.memory.expect("the machine has memory");
        (limit.most, relative(limit.source, root.path()))
    }

    fn threads(files: &[(&str, &str)]) -> (usize, Source) {
        let (system, root) = machine(files);
        (system.threads.most, relative(system.threads.source, root.path()))
    }

    fn relative(source: Source, root: &Path) -> Source {
        match source {
            Source::ControlGroup(file) => {
                Source::ControlGroup(file.strip_prefix(root).expect("below the root").to_path_buf())
            }
            other => other,
        }
    }

    fn group(file: &str) -> Source {
        Source::ControlGroup(file.into())
    }

    const V2_MOUNT: (&str, &str) =
        ("proc/self/mountinfo", "25 24 0:22 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n");

    #[test]
    fn a_machine_without_control_groups() {
        let (system, _root) = machine(&[]);
        assert_eq!((system.cpu.as_str(), system.processors), ("Toy 9", 4));
        assert_eq!(system.memory, Some(Limit { most: 8 * GIB, source: Source::Machine }));
        assert_eq!(system.threads, Limit { most: 4, source: Source::Machine });
        // And one that says nothing at all.
        let empty = tempfile::tempdir().expect("a temporary folder");
        let system = System::below(empty.path(), 7);
        assert_eq!((system.processors, system.threads.most, system.memory), (7, 7, None));
    }

    #[test]
    fn version_2_counts_the_least_up_the_tree() {
        let tree = |own: &'static str, above: &'static str| {
            [
                V2_MOUNT,
                ("proc/self/cgroup", "0::/kubepods/pod7/web\n"),
                ("sys/fs/cgroup/kubepods/pod7/web/memory.max", own),
                ("sys/fs/cgroup/kubepods/pod7/memory.max", above),
                ("sys/fs/cgroup/kubepods/memory.max", "max\n"),
                ("sys/fs/cgroup/kubepods/pod7/web/cpu.max", "150000 100000\n"),
                ("sys/fs/cgroup/kubepods/pod7/cpu.max", "max 100000\n"),
                ("sys/fs/cgroup/kubepods/cpu.max", "50000 25000\n"),
            ]
        };
        assert_eq!(memory(&tree("max\n", "268435456\n")), (256 * MIB, group("sys/fs/cgroup/kubepods/pod7/memory.max")));
        assert_eq!(
            memory(&tree("1048576\n", "268435456\n")),
            (MIB, group("sys/fs/cgroup/kubepods/pod7/web/memory.max"))
        );
        assert_eq!(memory(&tree("max\n", "max\n")), (8 * GIB, Source::Machine));
        // More than the machine has is no limit.
        assert_eq!(memory(&tree("max\n", "99999999999\n")), (8 * GIB, Source::Machine));
        assert_eq!(threads(&tree("max\n", "max\n")), (1, group("sys/fs/cgroup/kubepods/pod7/web/cpu.max")));
    }

    #[test]
    fn version_2_in_a_container_that_sees_its_own_group_as_the_root() {
        let files = |cpu: &'static str| {
            [
                V2_MOUNT,
                ("proc/self/cgroup", "0::/\n"),
                ("sys/fs/cgroup/memory.max", "209715200\n"),
                ("sys/fs/cgroup/cpu.max", cpu),
            ]
        };
        assert_eq!(memory(&files("max 100000\n")), (200 * MIB, group("sys/fs/cgroup/memory.max")));
        assert_eq!(threads(&files("200000 100000\n")), (2, group("sys/fs/cgroup/cpu.max")));
        assert_eq!(threads(&files("1000 100000\n")).0, 1, "part of a processor is one thread");
        assert_eq!(threads(&files("0 0\n")), (4, Source::Machine), "nonsense is no limit");
    }

    /// Both mounted: limits are where the controller is.
    const V1_MOUNTS: (&str, &str) = (
        "proc/self/mountinfo",
        "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n\
         35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
         41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
         21 20 8:1 / / rw - ext4 /dev/sda1 rw\n",
    );
    const V1_GROUPS: (&str, &str) =
        ("proc/self/cgroup", "9:name=systemd:/\n4:memory:/slurm/job_5\n2:cpu,cpuacct:/slurm/job_5\n0::/\n");
    const V1_UNLIMITED: &str = "9223372036854771712\n";

    #[test]
    fn version_1_counts_the_least_up_the_tree() {
        let tree = |own: &'static str, above: &'static str, hierarchy: &'static str| {
            [
                V1_MOUNTS,
                V1_GROUPS,
                ("sys/fs/cgroup/memory/slurm/job_5/memory.limit_in_bytes", own),
                ("sys/fs/cgroup/memory/slurm/job_5/memory.use_hierarchy", hierarchy),
                ("sys/fs/cgroup/memory/slurm/memory.limit_in_bytes", above),
                ("sys/fs/cgroup/memory/memory.limit_in_bytes", V1_UNLIMITED),
                ("sys/fs/cgroup/cpu,cpuacct/slurm/job_5/cpu.cfs_quota_us", "-1\n"),
                ("sys/fs/cgroup/cpu,cpuacct/slurm/job_5/cpu.cfs_period_us", "100000\n"),
                ("sys/fs/cgroup/cpu,cpuacct/slurm/cpu.cfs_quota_us", "300000\n"),
                ("sys/fs/cgroup/cpu,cpuacct/slurm/cpu.cfs_period_us", "100000\n"),
            ]
        };
        let above = "sys/fs/cgroup/memory/slurm/memory.limit_in_bytes";
        assert_eq!(memory(&tree(V1_UNLIMITED, "268435456\n", "1\n")), (256 * MIB, group(above)));
        let own = "sys/fs/cgroup/memory/slurm/job_5/memory.limit_in_bytes";
        assert_eq!(memory(&tree("1048576\n", "268435456\n", "1\n")), (MIB, group(own)));
        assert_eq!(memory(&tree(V1_UNLIMITED, V1_UNLIMITED, "1\n")), (8 * GIB, Source::Machine));
        assert_eq!(memory(&tree(V1_UNLIMITED, "268435456\n", "0\n")), (8 * GIB, Source::Machine), "told not to count");
        let quota = "sys/fs/cgroup/cpu,cpuacct/slurm/cpu.cfs_quota_us";
        assert_eq!(threads(&tree(V1_UNLIMITED, V1_UNLIMITED, "1\n")), (3, group(quota)));
    }

    /// Docker mounts a part of the hierarchy, and `/proc/self/cgroup` has the path from outside.
    #[test]
    fn version_1_in_a_container() {
        let files = |membership: &'static str| {
            [
                (
                    "proc/self/mountinfo",
                    "35 31 0:32 /docker/a\\040b /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n",
                ),
                ("proc/self/cgroup", membership),
                ("sys/fs/cgroup/memory/memory.limit_in_bytes", V1_UNLIMITED),
                // What only a group above says.
                ("sys/fs/cgroup/memory/memory.stat", "cache 0\nhierarchical_memory_limit 268435456\n"),
            ]
        };
        for membership in ["4:memory:/docker/a b\n", "4:memory:/elsewhere\n", "4:memory:/../../x\n", "4:memory:/\n"] {
            assert_eq!(memory(&files(membership)), (256 * MIB, group("sys/fs/cgroup/memory/memory.stat")));
        }
    }

    #[test]
    fn processors_that_the_process_may_not_run_on_do_not_count() {
        for (list, most) in [("0-1", 2), ("0,2-3", 3), ("3", 1), ("0-3", 4), ("0-1023", 4)] {
            let status = format!("SigIgn:\t0000000000000001\nCpus_allowed_list:\t{list}\n");
            assert_eq!(threads(&[("proc/self/status", &status)]).0, most, "{list}");
        }
        for nonsense in ["", "-", "3-1", "0-18446744073709551615", "x"] {
            assert_eq!(count(nonsense), None, "{nonsense}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_a_machine(cgroup: String, mountinfo: String, status: String) {
            let mount = format!("1 1 0:1 / /c rw - cgroup2 x rw\n{mountinfo}\n1 2 {mountinfo} - cgroup x rw,memory");
            let files = [("proc/self/cgroup", cgroup.as_str()), ("proc/self/mountinfo", &mount), ("proc/self/status", &status)];
            let (system, _root) = machine(&files);
            proptest::prop_assert!((1..=4).contains(&system.threads.most));
        }
    }
}
