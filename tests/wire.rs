//! The wire contract: `proto/cri.proto` says the same as the `k8s-cri` crate, which was generated from the public
//! contract independently of us, wherever that (older) crate has something to say; what ours has beyond it is listed
//! here by name, so that nothing slips in. And the bytes of one side's types are the bytes of the other's.
//!
//! Run by `cargo test --test wire`. Fails when a name, number, type or label differs. Leaves nothing behind.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use prost::Message;
use prost_reflect::{
    Cardinality, DescriptorPool, DynamicMessage, FieldDescriptor, Kind, MapKey, MessageDescriptor, ReflectMessage,
    Value,
};

/// What the contract has gained since the crate was made.
const BEYOND_THE_CRATE: &str = include_str!("wire-newer.txt");

/// Where the contract itself changed a field to a type with the same bytes: what the crate says.
const WIDENED: &[&str] = &["field runtime.v1.KeyValue.value = 2: string"];

/// Every fact that decides bytes or method paths, one a line.
fn facts(pool: &DescriptorPool) -> BTreeSet<String> {
    let mut facts = BTreeSet::new();
    for service in pool.services() {
        for m in service.methods() {
            let stream = |on| if on { "stream " } else { "" };
            facts.insert(format!(
                "rpc {}/{}({}{}) returns ({}{})",
                service.full_name(),
                m.name(),
                stream(m.is_client_streaming()),
                m.input().full_name(),
                stream(m.is_server_streaming()),
                m.output().full_name(),
            ));
        }
    }
    for e in pool.all_enums() {
        for v in e.values() {
            facts.insert(format!("enum {} {} = {}", e.full_name(), v.name(), v.number()));
        }
    }
    for message in pool.all_messages() {
        if !message.is_map_entry() {
            facts.insert(format!("message {}", message.full_name()));
        }
        for f in message.fields() {
            facts.insert(format!("field {}.{} = {}: {}", message.full_name(), f.name(), f.number(), field_type(&f)));
        }
    }
    facts
}

fn field_type(f: &FieldDescriptor) -> String {
    let label = match f.cardinality() {
        Cardinality::Repeated => "repeated ",
        Cardinality::Required => "required ",
        Cardinality::Optional => "",
    };
    let oneof = f.containing_oneof().map(|o| format!(" in {}", o.name())).unwrap_or_default();
    let packed = if f.is_packed() { " packed" } else { "" };
    format!("{label}{:?}{packed}{oneof}", f.kind())
}

fn ours() -> DescriptorPool {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let set = protox::compile(["cri.proto"], [root.join("proto")]).expect("proto/cri.proto compiles");
    DescriptorPool::from_file_descriptor_set(set).expect("descriptors of proto/cri.proto")
}

/// The contract that the crate carries: found where cargo unpacked the crate.
fn theirs() -> DescriptorPool {
    let folder = crate_folder("k8s-cri").join("proto");
    let set = protox::compile(["v1.proto"], [&folder]).expect("the crate's contract compiles");
    DescriptorPool::from_file_descriptor_set(set).expect("descriptors of the crate")
}

fn crate_folder(name: &str) -> PathBuf {
    #[allow(clippy::disallowed_methods)] // a test: the spawner belongs to the product
    let out = std::process::Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        // Crates of other platforms are not fetched by a build.
        .args(["metadata", "--format-version", "1", "--offline", "--locked"])
        .args(["--filter-platform", "x86_64-unknown-linux-gnu"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo metadata runs");
    assert!(out.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&out.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&out.stdout).expect("cargo metadata prints JSON");
    let packages = metadata["packages"].as_array().expect("packages");
    let package = packages.iter().find(|p| p["name"] == name).expect("the crate is a dependency");
    Path::new(package["manifest_path"].as_str().expect("manifest_path")).parent().expect("a folder").to_owned()
}

#[test]
fn says_the_same_as_the_independent_crate() {
    let (ours, theirs) = (facts(&ours()), facts(&theirs()));
    let missing: Vec<_> = theirs.difference(&ours).filter(|f| !WIDENED.contains(&f.as_str())).collect();
    assert!(missing.is_empty(), "proto/cri.proto lacks or differs in: {missing:#?}");
    assert!(theirs.len() > 600, "only {} facts compared", theirs.len());
}

#[test]
fn has_only_the_listed_additions() {
    let (ours, theirs) = (facts(&ours()), facts(&theirs()));
    let beyond: String = ours.difference(&theirs).map(|f| format!("{f}\n")).collect();
    assert_eq!(
        beyond, BEYOND_THE_CRATE,
        "tests/wire-newer.txt does not list what proto/cri.proto has beyond the crate"
    );
}

/// A message with every field set: scalars differ from each other, repeated fields have two elements, maps one.
fn filled(message: &MessageDescriptor, depth: u32, n: &mut u32) -> DynamicMessage {
    let mut out = DynamicMessage::new(message.clone());
    for f in message.fields() {
        if f.is_map() {
            let Kind::Message(entry) = f.kind() else { continue };
            if let Some(value) = scalar(&entry.map_entry_value_field().kind(), depth, n) {
                out.set_field(&f, Value::Map([(MapKey::String(format!("k{n}")), value)].into()));
            }
        } else if f.is_list() {
            let values: Vec<_> = (0..2).filter_map(|_| scalar(&f.kind(), depth, n)).collect();
            out.set_field(&f, Value::List(values));
        } else if let Some(value) = scalar(&f.kind(), depth, n) {
            out.set_field(&f, value);
        }
    }
    out
}

fn scalar(kind: &Kind, depth: u32, n: &mut u32) -> Option<Value> {
    *n += 1;
    Some(match kind {
        Kind::Bool => Value::Bool(true),
        Kind::String => Value::String(format!("text {n}")),
        Kind::Bytes => Value::Bytes(vec![*n as u8, 0, 255].into()),
        Kind::Int32 => Value::I32(-(*n as i32)),
        Kind::Int64 => Value::I64(-i64::from(*n) << 33),
        Kind::Uint32 => Value::U32(*n),
        Kind::Uint64 => Value::U64(u64::from(*n) << 33),
        Kind::Double => Value::F64(f64::from(*n) / 8.0),
        Kind::Enum(e) => Value::EnumNumber(e.values().last()?.number()),
        Kind::Message(m) if depth > 0 => Value::Message(filled(m, depth - 1, n)),
        Kind::Message(_) => return None,
        other => panic!("the contract has a new kind of field: {other:?}"),
    })
}

/// Bytes of `T` after reading and writing `bytes`.
fn through<T: Message + Default>(name: &str, bytes: &[u8]) -> Vec<u8> {
    T::decode(bytes).unwrap_or_else(|e| panic!("{name}: {e}")).encode_to_vec()
}

/// Each message, filled as the independent contract knows it, goes through both sides' Rust types unchanged.
macro_rules! same_bytes {
    ($($name:ident),* $(,)?) => {{
        use proxmox_lxcri::api::v1 as mine;
        use k8s_cri::v1 as other;
        let pool = theirs();
        let mut covered = BTreeSet::new();
        $({
            let name = stringify!($name);
            let message = pool.get_message_by_name(&format!("runtime.v1.{name}")).expect(name);
            let bytes = filled(&message, 8, &mut 0).encode_to_vec();
            let reference = through::<other::$name>(name, &bytes);
            assert_eq!(through::<mine::$name>(name, &bytes), reference, "{name}");
            // Nothing was dropped on the way: read back without our types, it is what went in.
            let back = DynamicMessage::decode(message.clone(), reference.as_slice()).expect(name);
            let sent = DynamicMessage::decode(message.clone(), bytes.as_slice()).expect(name);
            assert_eq!(back, sent, "{name}");
            cover(&back.descriptor(), &mut covered);
        })*
        covered
    }};
}

fn cover(message: &MessageDescriptor, covered: &mut BTreeSet<String>) {
    if covered.insert(message.full_name().to_owned()) {
        for f in message.fields() {
            if let Kind::Message(m) = f.kind() {
                cover(&m, covered);
            }
        }
    }
}

#[test]
fn bytes_of_one_side_are_bytes_of_the_other() {
    let covered = same_bytes!(
        VersionRequest,
        VersionResponse,
        RunPodSandboxRequest,
        RunPodSandboxResponse,
        StopPodSandboxRequest,
        RemovePodSandboxRequest,
        PodSandboxStatusRequest,
        PodSandboxStatusResponse,
        ListPodSandboxRequest,
        ListPodSandboxResponse,
        CreateContainerRequest,
        CreateContainerResponse,
        StartContainerRequest,
        StopContainerRequest,
        RemoveContainerRequest,
        ListContainersRequest,
        ListContainersResponse,
        ContainerStatusRequest,
        ContainerStatusResponse,
        UpdateContainerResourcesRequest,
        ReopenContainerLogRequest,
        ExecSyncRequest,
        ExecSyncResponse,
        ExecRequest,
        ExecResponse,
        AttachRequest,
        AttachResponse,
        PortForwardRequest,
        PortForwardResponse,
        ContainerStatsRequest,
        ContainerStatsResponse,
        ListContainerStatsRequest,
        ListContainerStatsResponse,
        PodSandboxStatsRequest,
        PodSandboxStatsResponse,
        ListPodSandboxStatsRequest,
        ListPodSandboxStatsResponse,
        UpdateRuntimeConfigRequest,
        StatusRequest,
        StatusResponse,
        CheckpointContainerRequest,
        ContainerEventResponse,
        ListMetricDescriptorsResponse,
        ListPodSandboxMetricsResponse,
        RuntimeConfigResponse,
        ListImagesRequest,
        ListImagesResponse,
        ImageStatusRequest,
        ImageStatusResponse,
        PullImageRequest,
        PullImageResponse,
        RemoveImageRequest,
        ImageFsInfoResponse,
    );
    // All messages of the crate that have fields were exercised, directly or inside another.
    let all =
        theirs().all_messages().filter(|m| m.fields().next().is_some()).map(|m| m.full_name().to_owned()).collect();
    let left: Vec<_> = BTreeSet::difference(&all, &covered).collect();
    assert!(left.is_empty(), "not exercised: {left:?}");
}
