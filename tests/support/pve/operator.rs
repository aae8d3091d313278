//! What somebody with the GUI does to guests: the same work under the same locks as the API's calls have it.

use std::sync::Arc;
use std::time::Instant;

use super::Pve;
use super::state::Server;

impl Server {
    async fn reboot(self: &Arc<Self>, vmid: u32) -> Result<(), String> {
        let lock = self.guest_lock(vmid);
        let _held = lock.lock().await;
        self.power_off(vmid, Some((60.0, true))).await?;
        tokio::time::sleep(self.seconds(1.0)).await;
        self.power_on(vmid).await
    }

    /// In restart mode: what ran is stopped, and started there.
    async fn migrate(&self, vmid: u32, node: &str) -> Result<(), String> {
        let lock = self.guest_lock(vmid);
        let _held = lock.lock().await;
        self.set_lock(vmid, Some("migrate"));
        self.power_off(vmid, Some((60.0, true))).await?;
        tokio::time::sleep(self.seconds(20.0)).await;
        if let Some(guest) = self.lock().guests.get_mut(&vmid) {
            (guest.node, guest.running) = (node.to_owned(), Some(Instant::now()));
            guest.config.remove("lock");
        }
        Ok(())
    }

    async fn destroy(&self, vmid: u32, unreferenced: bool) -> Result<(), String> {
        let lock = self.guest_lock(vmid);
        let _held = lock.lock().await;
        self.power_off(vmid, None).await?;
        self.remove_files(vmid, unreferenced);
        self.forget_addresses(vmid);
        self.lock().guests.remove(&vmid);
        Ok(())
    }

    fn set_lock(&self, vmid: u32, lock: Option<&str>) {
        if let Some(guest) = self.lock().guests.get_mut(&vmid) {
            match lock {
                Some(lock) => guest.config.insert("lock".into(), lock.into()),
                None => guest.config.remove("lock"),
            };
        }
    }
}

impl Pve {
    fn operate<F>(&self, work: impl FnOnce(Arc<Server>) -> F)
    where
        F: Future<Output = Result<(), String>> + Send + 'static,
    {
        let runtime = self.runtime.as_ref().expect("the server runs");
        let (tell, told) = std::sync::mpsc::channel();
        let work = work(self.state.clone());
        runtime.spawn(async move { tell.send(work.await) });
        told.recv().expect("its end").expect("what the operator does");
    }

    /// Stops a guest.
    pub fn stop_guest(&self, vmid: u32) {
        self.operate(|server| async move { server.power_off(vmid, None).await });
    }

    /// Stops it and starts it again.
    pub fn reboot_guest(&self, vmid: u32) {
        self.operate(|server| async move { server.reboot(vmid).await });
    }

    /// Moves it to another node of the cluster.
    pub fn migrate_guest(&self, vmid: u32, node: &str) {
        self.state.lock().others = vec![node.to_owned()];
        let node = node.to_owned();
        self.operate(|server| async move { server.migrate(vmid, &node).await });
    }

    /// Deletes it, whatever it is and whoever has locked it: `pct unlock`, `pct destroy`.
    pub fn destroy_guest(&self, vmid: u32) {
        self.operate(|server| async move { server.destroy(vmid, false).await });
    }

    /// The same with `--destroy-unreferenced-disks 1`.
    pub fn destroy_guest_and_volumes(&self, vmid: u32) {
        self.operate(|server| async move { server.destroy(vmid, true).await });
    }

    /// Something has locked it ("backup"), or (None) has ended.
    pub fn lock_guest(&self, vmid: u32, lock: Option<&str>) {
        self.state.set_lock(vmid, lock);
    }

    /// Changes a value of its configuration.
    pub fn set_config(&self, vmid: u32, key: &str, value: &str) {
        if let Some(guest) = self.state.lock().guests.get_mut(&vmid) {
            guest.config.insert(key.into(), value.into());
        }
    }

    /// A guest in our pool with these notes, on a node of the cluster; it does not run.
    pub fn add_guest_with_notes(&self, vmid: u32, node: &str, notes: &str) {
        let config =
            [("hostname", "made-elsewhere"), ("description", notes), ("rootfs", "local:subvol-1-disk-0,size=1G")];
        let config = config.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
        let guest = super::guests::Guest {
            node: node.into(),
            ..super::guests::Guest::new(super::guests::Kind::Ct, config, "k8s".into())
        };
        self.state.lock().guests.insert(vmid, guest);
    }
}
