//! Which images this machine runs: operating system, architecture and its level. Pure.

/// An operating system and architecture as images name them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Platform {
    /// "linux".
    pub os: String,
    /// "amd64", "arm64", ...
    pub architecture: String,
    /// "v8", ... or "".
    pub variant: String,
}

impl std::fmt::Display for Platform {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        if !self.variant.is_empty() {
            write!(f, "/{}", self.variant)?;
        }
        Ok(())
    }
}

impl Platform {
    /// This machine's.
    pub fn host() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            "x86" => "386",
            "powerpc64" => "ppc64le",
            other => other,
        };
        Self { os: "linux".into(), architecture: architecture.into(), variant: String::new() }
    }

    /// How well `offered` fits: None not at all, else the smaller the better.
    pub(super) fn fit(&self, offered: &Platform) -> Option<u32> {
        if self.os != offered.os || self.architecture != offered.architecture {
            return None;
        }
        match (offered.architecture.as_str(), offered.variant.as_str()) {
            (_, "") | ("amd64", "v1") | ("arm64", "v8") => Some(0),
            ("amd64", level) if x86_level() >= level_number(level)? => Some(level_number(level)?),
            _ => None,
        }
    }
}

fn level_number(level: &str) -> Option<u32> {
    level.strip_prefix('v')?.parse().ok()
}

/// The x86-64 level of this machine.
#[cfg(target_arch = "x86_64")]
fn x86_level() -> u32 {
    let v2 = std::is_x86_feature_detected!("sse4.2") && std::is_x86_feature_detected!("popcnt");
    let v3 = v2 && std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("bmi2");
    let v4 = v3 && std::is_x86_feature_detected!("avx512f") && std::is_x86_feature_detected!("avx512bw");
    1 + u32::from(v2) + u32::from(v3) + u32::from(v4)
}

#[cfg(not(target_arch = "x86_64"))]
fn x86_level() -> u32 {
    0
}
