//! Wrong requests and a broken machine: the right gRPC code, a message that names the object and the cause, and nothing
//! left behind.
//!
//! Run by `cargo test --test bad_input`, as root. A crash leaves nothing: see `support`.

// A test breaks the machine as it likes.
#![allow(clippy::disallowed_methods)]

mod support;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use k8s_cri::v1 as cri;
use support::client::{Client, block_on, container, create_request, image_spec, pod, pull_request};
use support::crictl::{BIG, BUSYBOX};
use support::node::{Node, Options};
use support::{isolated, snapshot};
use tonic::{Code, Response, Status};

/// The failure of a call: one of `codes`, its message naming all of `words`.
#[track_caller]
fn refused<T>(answer: Result<Response<T>, Status>, codes: &[Code], words: &[&str]) -> Status {
    let Err(status) = answer else { panic!("succeeded, {codes:?} was due") };
    assert!(codes.contains(&status.code()), "{codes:?} was due: {status:?}");
    for word in words {
        assert!(status.message().contains(word), "the message does not name {word:?}: {status:?}");
    }
    assert!(!status.message().contains("panicked"), "{status:?}");
    status
}

fn run_request(config: &cri::PodSandboxConfig) -> cri::RunPodSandboxRequest {
    cri::RunPodSandboxRequest { config: Some(config.clone()), ..Default::default() }
}

/// Nothing is listed.
async fn assert_empty(client: &mut Client) {
    let pods = client.runtime.list_pod_sandbox(cri::ListPodSandboxRequest::default()).await.expect("ListPodSandbox");
    assert_eq!(pods.into_inner().items, []);
    let list = client.runtime.list_containers(cri::ListContainersRequest::default()).await.expect("ListContainers");
    assert_eq!(list.into_inner().containers, []);
}

#[test]
fn unknown_and_malformed_ids() {
    isolated("unknown_and_malformed_ids", || {
        let node = Node::start(Options::default());
        block_on(async {
            let mut c = Client::connect(&node.socket()).await;
            let unknown = "f".repeat(64);
            for id in [unknown.as_str(), "nope", "../../../etc", &"a".repeat(5000), "with space", "%s\n"] {
                let known = id == unknown;
                let codes: &[Code] = if known { &[Code::NotFound] } else { &[Code::NotFound, Code::InvalidArgument] };
                let r = &mut c.runtime;
                let (id, cmd) = (id.to_owned(), vec!["true".to_owned()]);
                let container_id = || id.clone();
                let pod_sandbox_id = || id.clone();
                refused(
                    r.pod_sandbox_status(cri::PodSandboxStatusRequest { pod_sandbox_id: id.clone(), verbose: false })
                        .await,
                    codes,
                    &[],
                );
                refused(
                    r.container_status(cri::ContainerStatusRequest { container_id: id.clone(), verbose: true }).await,
                    codes,
                    &[],
                );
                refused(
                    r.start_container(cri::StartContainerRequest { container_id: container_id() }).await,
                    codes,
                    &[],
                );
                refused(
                    r.exec_sync(cri::ExecSyncRequest { container_id: container_id(), cmd: cmd.clone(), timeout: 1 })
                        .await,
                    codes,
                    &[],
                );
                let exec = cri::ExecRequest { container_id: container_id(), cmd, stdout: true, ..Default::default() };
                refused(r.exec(exec).await, codes, &[]);
                let attach = cri::AttachRequest { container_id: container_id(), stdout: true, ..Default::default() };
                refused(r.attach(attach).await, codes, &[]);
                let forward = cri::PortForwardRequest { pod_sandbox_id: pod_sandbox_id(), port: vec![80] };
                refused(r.port_forward(forward).await, codes, &[]);
                refused(
                    r.reopen_container_log(cri::ReopenContainerLogRequest { container_id: container_id() }).await,
                    codes,
                    &[],
                );
                let update =
                    cri::UpdateContainerResourcesRequest { container_id: container_id(), ..Default::default() };
                refused(r.update_container_resources(update).await, codes, &[]);
                refused(
                    r.container_stats(cri::ContainerStatsRequest { container_id: container_id() }).await,
                    codes,
                    &[],
                );
                refused(
                    r.pod_sandbox_stats(cri::PodSandboxStatsRequest { pod_sandbox_id: pod_sandbox_id() }).await,
                    codes,
                    &[],
                );
                let config = pod("none", &node.dir);
                refused(
                    r.create_container(create_request(&id, container("c", BUSYBOX, "true"), &config)).await,
                    codes,
                    &[],
                );
                if known {
                    // Removal is what was wanted: it is gone.
                    r.remove_container(cri::RemoveContainerRequest { container_id: container_id() })
                        .await
                        .expect("RemoveContainer");
                    r.remove_pod_sandbox(cri::RemovePodSandboxRequest { pod_sandbox_id: pod_sandbox_id() })
                        .await
                        .expect("RemovePodSandbox");
                    r.stop_pod_sandbox(cri::StopPodSandboxRequest { pod_sandbox_id: pod_sandbox_id() })
                        .await
                        .expect("StopPodSandbox");
                }
            }
            // A filter that fits nothing is no error.
            let filter = cri::ContainerFilter { id: "nope".into(), ..Default::default() };
            let list = c.runtime.list_containers(cri::ListContainersRequest { filter: Some(filter) }).await;
            assert!(list.expect("ListContainers").into_inner().containers.is_empty());
            assert_empty(&mut c).await;
        });
    });
}

#[test]
fn requests_that_make_no_sense() {
    isolated("requests_that_make_no_sense", || {
        let node = Node::start(Options::default());
        let logs = node.dir.join("logs");
        block_on(async {
            let mut c = Client::connect(&node.socket()).await;
            c.pull(BUSYBOX).await;
            let before = snapshot::take(&node);
            let invalid = &[Code::InvalidArgument];
            refused(c.runtime.run_pod_sandbox(cri::RunPodSandboxRequest::default()).await, invalid, &["config"]);
            refused(
                c.runtime.run_pod_sandbox(run_request(&cri::PodSandboxConfig::default())).await,
                invalid,
                &["metadata"],
            );
            for missing in ["name", "uid", "namespace"] {
                let mut config = pod("p", &logs);
                let m = config.metadata.as_mut().expect("metadata");
                match missing {
                    "name" => m.name.clear(),
                    "uid" => m.uid.clear(),
                    _ => m.namespace.clear(),
                }
                refused(c.runtime.run_pod_sandbox(run_request(&config)).await, invalid, &[missing]);
            }
            let mut config = pod("p", &logs);
            config.log_directory = "relative/path".into();
            refused(c.runtime.run_pod_sandbox(run_request(&config)).await, invalid, &["relative/path"]);
            let mut request = run_request(&pod("p", &logs));
            request.runtime_handler = "no-such-handler".into();
            refused(c.runtime.run_pod_sandbox(request).await, invalid, &["no-such-handler"]);
            assert_empty(&mut c).await;
            snapshot::assert_back_to(&before, &node);

            // The same name again: the same pod, or a clear no.
            let config = pod("p", &logs);
            let id = c
                .runtime
                .run_pod_sandbox(run_request(&config))
                .await
                .expect("RunPodSandbox")
                .into_inner()
                .pod_sandbox_id;
            match c.runtime.run_pod_sandbox(run_request(&config)).await {
                Ok(again) => assert_eq!(again.into_inner().pod_sandbox_id, id),
                again => drop(refused(again, &[Code::AlreadyExists], &["p"])),
            }
            let create = |config: cri::ContainerConfig| create_request(&id, config, &pod("p", &logs));
            let mut bad = container("c", BUSYBOX, "true");
            bad.metadata = None;
            refused(c.runtime.create_container(create(bad)).await, invalid, &["metadata"]);
            let mut bad = container("c", BUSYBOX, "true");
            bad.image = None;
            refused(c.runtime.create_container(create(bad)).await, invalid, &["image"]);
            let mut bad = container("c", BUSYBOX, "true");
            bad.image = Some(image_spec("/var/lib/kubelet/checkpoints/c.tar"));
            refused(c.runtime.create_container(create(bad)).await, &[Code::Unimplemented], &["c.tar", "restored"]);
            let bad = container("c", "registry.k8s.io/not/pulled:1", "true");
            refused(
                c.runtime.create_container(create(bad)).await,
                &[Code::NotFound],
                &["registry.k8s.io/not/pulled:1"],
            );
            let mut bad = container("c", BUSYBOX, "true");
            bad.mounts.push(cri::Mount {
                container_path: "relative".into(),
                host_path: "/tmp".into(),
                ..Default::default()
            });
            refused(c.runtime.create_container(create(bad)).await, invalid, &["relative"]);
            let mut bad = container("c", BUSYBOX, "true");
            bad.mounts.push(cri::Mount {
                container_path: "/x".into(),
                host_path: "/dev/null/no-folder".into(),
                ..Default::default()
            });
            refused(c.runtime.create_container(create(bad)).await, invalid, &["/dev/null/no-folder"]);
            for path in ["/", "/x/../.."] {
                let mut bad = container("c", BUSYBOX, "true");
                let (container_path, host_path) = (path.to_owned(), "/tmp".to_owned());
                bad.mounts.push(cri::Mount { container_path, host_path, ..Default::default() });
                refused(c.runtime.create_container(create(bad)).await, invalid, &[path]);
            }
            let limited = |limits: cri::LinuxContainerResources| {
                let mut bad = container("c", BUSYBOX, "true");
                bad.linux.get_or_insert_default().resources = Some(limits);
                bad
            };
            let bad = limited(cri::LinuxContainerResources { cpuset_cpus: "9999".into(), ..Default::default() });
            refused(c.runtime.create_container(create(bad)).await, invalid, &["cpuset_cpus", "9999"]);
            let bad = limited(cri::LinuxContainerResources { memory_limit_in_bytes: 1000, ..Default::default() });
            refused(c.runtime.create_container(create(bad)).await, invalid, &["memory_limit_in_bytes", "1000"]);
            let mut bad = container("c", BUSYBOX, "true");
            bad.log_path = "../../../escape.log".into();
            refused(c.runtime.create_container(create(bad)).await, invalid, &["escape.log"]);

            let first = c
                .runtime
                .create_container(create(container("c", BUSYBOX, "sleep 100")))
                .await
                .expect("CreateContainer");
            let first = first.into_inner().container_id;
            match c.runtime.create_container(create(container("c", BUSYBOX, "sleep 100"))).await {
                Ok(again) => assert_eq!(again.into_inner().container_id, first),
                again => drop(refused(again, &[Code::AlreadyExists], &["c"])),
            }
            // Not running: no exec; not stopped: no second start.
            let exec = |timeout| cri::ExecSyncRequest {
                container_id: first.clone(),
                cmd: ["sleep", "30"].map(String::from).to_vec(),
                timeout,
            };
            refused(c.runtime.exec_sync(exec(1)).await, &[Code::FailedPrecondition], &[]);
            c.runtime
                .start_container(cri::StartContainerRequest { container_id: first.clone() })
                .await
                .expect("StartContainer");
            let again = c.runtime.start_container(cri::StartContainerRequest { container_id: first.clone() }).await;
            if again.is_err() {
                refused(again, &[Code::FailedPrecondition], &[]);
            }
            refused(c.runtime.exec_sync(exec(1)).await, &[Code::DeadlineExceeded], &[]);
            let mut nothing = exec(5);
            nothing.cmd.clear();
            refused(c.runtime.exec_sync(nothing).await, invalid, &["command"]);
            let remove = cri::RemovePodSandboxRequest { pod_sandbox_id: id.clone() };
            c.runtime
                .stop_pod_sandbox(cri::StopPodSandboxRequest { pod_sandbox_id: id.clone() })
                .await
                .expect("StopPodSandbox");
            c.runtime.remove_pod_sandbox(remove).await.expect("RemovePodSandbox");
            assert_empty(&mut c).await;
            let mut before = before;
            before.entry("interfaces").or_default().push("lxcri-t0".into());
            snapshot::assert_back_to(&before, &node);
        });
    });
}

#[test]
fn a_program_that_is_not_there() {
    isolated("a_program_that_is_not_there", || {
        let node = Node::start(Options::default());
        block_on(async {
            let mut c = Client::connect(&node.socket()).await;
            c.pull(BUSYBOX).await;
            let config = pod("p", &node.dir.join("logs"));
            let id = c
                .runtime
                .run_pod_sandbox(run_request(&config))
                .await
                .expect("RunPodSandbox")
                .into_inner()
                .pod_sandbox_id;
            let mut bad = container("c", BUSYBOX, "");
            bad.command = vec!["/no/such/program".into()];
            // Told at its start, by name; it then has ended.
            let created = c.runtime.create_container(create_request(&id, bad, &config)).await.expect("CreateContainer");
            let container_id = created.into_inner().container_id;
            let start = cri::StartContainerRequest { container_id: container_id.clone() };
            refused(c.runtime.start_container(start).await, &[Code::InvalidArgument], &["/no/such/program"]);
            let status = cri::ContainerStatusRequest { container_id, verbose: false };
            let status = c.runtime.container_status(status).await.expect("ContainerStatus").into_inner().status;
            let status = status.expect("a status");
            assert_eq!((status.exit_code, status.reason.as_str()), (128, "StartError"), "{status:?}");
            c.runtime
                .stop_pod_sandbox(cri::StopPodSandboxRequest { pod_sandbox_id: id.clone() })
                .await
                .expect("StopPodSandbox");
            c.runtime
                .remove_pod_sandbox(cri::RemovePodSandboxRequest { pod_sandbox_id: id })
                .await
                .expect("RemovePodSandbox");
            assert_empty(&mut c).await;
        });
    });
}

#[test]
fn images_that_cannot_be_had() {
    isolated("images_that_cannot_be_had", || {
        let node = Node::start(Options::default());
        block_on(async {
            let mut c = Client::connect(&node.socket()).await;
            let before = snapshot::take(&node);
            let i = &mut c.images;
            for bad in [
                "",
                "lower/UPPER",
                "a//b",
                "registry.k8s.io/x:tag with space",
                "registry.k8s.io/x@sha256:short",
                "../x",
            ] {
                refused(i.pull_image(pull_request(bad)).await, &[Code::InvalidArgument], &[bad]);
            }
            refused(i.pull_image(cri::PullImageRequest::default()).await, &[Code::InvalidArgument], &["image"]);
            let absent = "registry.k8s.io/no/such/image:1";
            refused(i.pull_image(pull_request(absent)).await, &[Code::NotFound], &[absent]);
            let absent = "registry.k8s.io/e2e-test-images/busybox:no-such-tag";
            refused(i.pull_image(pull_request(absent)).await, &[Code::NotFound], &[absent]);
            let away = "unreachable.test/image:1";
            refused(i.pull_image(pull_request(away)).await, &[Code::Unavailable], &[away, "127.0.0.1:1"]);
            // An image that is not there is no error for these two.
            let status =
                cri::ImageStatusRequest { image: Some(image_spec("registry.k8s.io/absent:1")), verbose: false };
            assert_eq!(i.image_status(status).await.expect("ImageStatus").into_inner().image, None);
            let remove = cri::RemoveImageRequest { image: Some(image_spec("registry.k8s.io/absent:1")) };
            i.remove_image(remove).await.expect("RemoveImage");
            let list = i.list_images(cri::ListImagesRequest::default()).await.expect("ListImages");
            assert_eq!(list.into_inner().images, []);
            snapshot::assert_back_to(&before, &node);
        });
    });
}

#[test]
fn crun_is_missing() {
    isolated("crun_is_missing", || {
        let crun = "/nowhere/crun";
        let node = Node::start(Options { crun: crun.into(), ..Options::default() });
        block_on(async {
            let mut c = Client::connect(&node.socket()).await;
            c.pull(BUSYBOX).await;
            let status = c.runtime.status(cri::StatusRequest { verbose: false }).await.expect("Status").into_inner();
            let conditions = status.status.expect("a status").conditions;
            let ready = conditions.iter().find(|c| c.r#type == "RuntimeReady").expect("RuntimeReady");
            assert!(!ready.status && ready.message.contains(crun), "{ready:?}");
            let before = snapshot::take(&node);
            let config = pod("p", &node.dir.join("logs"));
            let codes = &[Code::FailedPrecondition, Code::Unavailable, Code::Internal, Code::NotFound];
            match c.runtime.run_pod_sandbox(run_request(&config)).await {
                Ok(id) => {
                    let id = id.into_inner().pod_sandbox_id;
                    let create = create_request(&id, container("c", BUSYBOX, "true"), &config);
                    refused(c.runtime.create_container(create).await, codes, &[crun]);
                    c.runtime
                        .stop_pod_sandbox(cri::StopPodSandboxRequest { pod_sandbox_id: id.clone() })
                        .await
                        .expect("StopPodSandbox");
                    let remove = cri::RemovePodSandboxRequest { pod_sandbox_id: id };
                    c.runtime.remove_pod_sandbox(remove).await.expect("RemovePodSandbox");
                }
                failed => drop(refused(failed, codes, &[crun])),
            }
            assert_empty(&mut c).await;
            let mut before = before;
            before.entry("interfaces").or_default().push("lxcri-t0".into());
            snapshot::assert_back_to(&before, &node);
        });
    });
}

/// A CNI plugin that fails as long as the file `flag` is there, and then does nothing successfully.
fn write_plugin(folder: &Path, flag: &Path) {
    std::fs::create_dir_all(folder).expect("the plugin's folder");
    let script = format!(
        "#!/bin/sh\nif [ $CNI_COMMAND = ADD ] && [ -e {flag} ]; then\n  echo '{{\"cniVersion\":\"1.0.0\",\"code\":11,\"msg\":\"no addresses left\",\"details\":\"(a test)\"}}'; exit 1\nfi\n\
         [ $CNI_COMMAND = VERSION ] && echo '{{\"cniVersion\":\"1.0.0\",\"supportedVersions\":[\"1.0.0\"]}}' && exit 0\n\
         [ $CNI_COMMAND = ADD ] && echo '{{\"cniVersion\":\"1.0.0\",\"interfaces\":[],\"ips\":[{{\"address\":\"10.99.0.2/24\"}}]}}'\nexit 0\n",
        flag = flag.display()
    );
    let path = folder.join("lxcri-fails");
    std::fs::write(&path, script).expect("the plugin");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("chmod");
}

#[test]
fn the_network_fails() {
    isolated("the_network_fails", || {
        let (plugins, flag) = (Path::new("/tmp/plugins"), Path::new("/tmp/fail"));
        write_plugin(plugins, flag);
        std::fs::write(flag, "").expect("the flag");
        let node = Node::start(Options {
            plugin_dirs: vec![plugins.display().to_string(), "/usr/lib/cni".into()],
            network: r#"{"cniVersion":"1.0.0","name":"lxcri-test","plugins":[{"type":"lxcri-fails"}]}"#.into(),
            ..Options::default()
        });
        block_on(async {
            let mut c = Client::connect(&node.socket()).await;
            let before = snapshot::take(&node);
            let config = pod("p", &node.dir.join("logs"));
            for _ in 0..2 {
                let codes = &[Code::Unavailable, Code::Internal, Code::ResourceExhausted, Code::FailedPrecondition];
                refused(
                    c.runtime.run_pod_sandbox(run_request(&config)).await,
                    codes,
                    &["lxcri-fails", "no addresses left"],
                );
                assert_empty(&mut c).await;
                snapshot::assert_back_to(&before, &node);
            }
            // The name is free for the retry.
            std::fs::remove_file(flag).expect("the flag");
            let id = c
                .runtime
                .run_pod_sandbox(run_request(&config))
                .await
                .expect("RunPodSandbox")
                .into_inner()
                .pod_sandbox_id;
            c.runtime
                .stop_pod_sandbox(cri::StopPodSandboxRequest { pod_sandbox_id: id.clone() })
                .await
                .expect("StopPodSandbox");
            c.runtime
                .remove_pod_sandbox(cri::RemovePodSandboxRequest { pod_sandbox_id: id })
                .await
                .expect("RemovePodSandbox");
            snapshot::assert_back_to(&before, &node);
        });
    });
}

#[test]
fn the_disk_is_full() {
    isolated("the_disk_is_full", || {
        let node = Node::start(Options { root_size_mib: Some(64), ..Options::default() });
        let used = || {
            let out = support::run(std::process::Command::new("du").arg("-sk").arg(node.dir.join("lib")));
            out.split_whitespace().next().and_then(|n| n.parse::<u64>().ok()).expect("kilobytes")
        };
        block_on(async {
            let mut c = Client::connect(&node.socket()).await;
            c.pull(BUSYBOX).await;
            let (before, used_before) = (snapshot::take(&node), used());
            refused(
                c.images.pull_image(pull_request(BIG)).await,
                &[Code::ResourceExhausted],
                &[BIG, "No space left on device"],
            );
            let list = c.images.list_images(cri::ListImagesRequest::default()).await.expect("ListImages").into_inner();
            assert_eq!(list.images.len(), 1, "{list:?}");
            snapshot::assert_back_to(&before, &node);
            assert!(used() <= used_before + 1024, "{} KiB are in use, {used_before} were", used());
            // What is there still works.
            let config = pod("p", &node.dir.join("logs"));
            let id = c
                .runtime
                .run_pod_sandbox(run_request(&config))
                .await
                .expect("RunPodSandbox")
                .into_inner()
                .pod_sandbox_id;
            c.runtime
                .remove_pod_sandbox(cri::RemovePodSandboxRequest { pod_sandbox_id: id })
                .await
                .expect("RemovePodSandbox");
        });
    });
}

#[test]
fn the_log_cannot_be_made() {
    isolated("the_log_cannot_be_made", || {
        let node = Node::start(Options::default());
        block_on(async {
            let mut c = Client::connect(&node.socket()).await;
            c.pull(BUSYBOX).await;
            std::fs::write("/tmp/a-file", "").expect("a file");
            let before = snapshot::take(&node);
            let mut config = pod("p", &node.dir.join("logs"));
            config.log_directory = "/tmp/a-file/logs".into();
            let codes = &[Code::FailedPrecondition, Code::InvalidArgument, Code::Internal, Code::NotFound];
            match c.runtime.run_pod_sandbox(run_request(&config)).await {
                Ok(id) => {
                    let id = id.into_inner().pod_sandbox_id;
                    let request = create_request(&id, container("c", BUSYBOX, "true"), &config);
                    match c.runtime.create_container(request).await {
                        Ok(created) => {
                            let start = cri::StartContainerRequest { container_id: created.into_inner().container_id };
                            refused(c.runtime.start_container(start).await, codes, &["/tmp/a-file/logs"]);
                        }
                        failed => drop(refused(failed, codes, &["/tmp/a-file/logs"])),
                    }
                    c.runtime
                        .stop_pod_sandbox(cri::StopPodSandboxRequest { pod_sandbox_id: id.clone() })
                        .await
                        .expect("StopPodSandbox");
                    let remove = cri::RemovePodSandboxRequest { pod_sandbox_id: id };
                    c.runtime.remove_pod_sandbox(remove).await.expect("RemovePodSandbox");
                }
                failed => drop(refused(failed, codes, &["/tmp/a-file/logs"])),
            }
            assert_empty(&mut c).await;
            let mut before = before;
            before.entry("interfaces").or_default().push("lxcri-t0".into());
            snapshot::assert_back_to(&before, &node);
        });
    });
}

#[test]
fn what_a_handlers_policy_forbids() {
    isolated("what_a_handlers_policy_forbids", || {
        let policy = "[handlers.crun.policy]\nrequire_seccomp = true\ndrop_capabilities = [\"NET_RAW\"]\nmax_memory = 67108864\n";
        let node = Node::start(Options { more_config: policy.into(), ..Options::default() });
        block_on(async {
            let mut c = Client::connect(&node.socket()).await;
            c.pull(BUSYBOX).await;
            let config = pod("p", &node.dir.join("logs"));
            let id = c.runtime.run_pod_sandbox(run_request(&config)).await.expect("RunPodSandbox").into_inner();
            let id = id.pod_sandbox_id;
            let with = |memory: i64, change: fn(&mut cri::LinuxContainerSecurityContext)| {
                let mut made = container("c", BUSYBOX, "grep CapEff /proc/self/status; sleep 1000");
                let linux = made.linux.as_mut().expect("linux");
                linux.resources =
                    Some(cri::LinuxContainerResources { memory_limit_in_bytes: memory, ..Default::default() });
                let security = linux.security_context.as_mut().expect("a security context");
                security.seccomp = Some(cri::SecurityProfile::default());
                change(security);
                create_request(&id, made, &config)
            };
            let code = &[Code::FailedPrecondition];
            for (request, key) in [
                (with(0, |_| ()), "handlers.crun.policy.max_memory"),
                (with(1 << 27, |_| ()), "handlers.crun.policy.max_memory"),
                (with(1 << 26, |s| s.seccomp = None), "handlers.crun.policy.require_seccomp"),
                (with(1 << 26, |s| s.privileged = true), "handlers.crun.policy.require_seccomp"),
                (
                    with(1 << 26, |s| {
                        let add_capabilities = vec!["NET_RAW".into()];
                        s.capabilities = Some(cri::Capability { add_capabilities, ..Default::default() });
                    }),
                    "handlers.crun.policy.drop_capabilities",
                ),
            ] {
                refused(c.runtime.create_container(request).await, code, &[key, "\"c\""]);
            }
            let made = c.runtime.create_container(with(1 << 26, |_| ())).await.expect("CreateContainer").into_inner();
            let container_id = made.container_id;
            let start = cri::StartContainerRequest { container_id: container_id.clone() };
            c.runtime.start_container(start).await.expect("StartContainer");
            let log = node.dir.join("logs/p/c.log");
            let caps = loop {
                let text = std::fs::read_to_string(&log).unwrap_or_default();
                if let Some(word) = text.lines().find_map(|l| l.rsplit_once("CapEff:\t")) {
                    break u64::from_str_radix(word.1, 16).expect("a number");
                }
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            };
            // CAP_NET_RAW is 13, CAP_CHOWN 0.
            assert_eq!((caps >> 13 & 1, caps & 1), (0, 1), "{caps:x}");
            let linux = cri::LinuxContainerResources { memory_limit_in_bytes: 1 << 27, ..Default::default() };
            let update =
                cri::UpdateContainerResourcesRequest { container_id, linux: Some(linux), ..Default::default() };
            refused(c.runtime.update_container_resources(update).await, code, &["handlers.crun.policy.max_memory"]);
        });
    });
}
