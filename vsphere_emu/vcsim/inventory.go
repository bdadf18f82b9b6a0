package main

import (
	"fmt"
	"os"
	"path"
	"sort"
	"strconv"
	"strings"
	"time"

	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

const (
	taskPoll        = 20 * time.Microsecond
	syntheticStore  = "synthetic"
	syntheticNumber = 100_000 // fixtures' moids are below
	syntheticBytes  = 10 << 30
	virtualSwitch   = "vSwitch0"
)

// Inventory builds datacenter, hosts, networks and VMs by the simulator's own methods. It calls
// them directly, and never over the wire: a thousand VMs are there within seconds.
type Inventory struct {
	ctx     *simulator.Context
	fixture *Fixture
	dc      *simulator.Datacenter
	hosts   []*simulator.HostSystem
	pool    types.ManagedObjectReference
	folders map[string]*simulator.Folder
}

func build(ctx *simulator.Context, fixture *Fixture) (*Inventory, error) {
	in := &Inventory{ctx: ctx, fixture: fixture, folders: map[string]*simulator.Folder{}}
	steps := []func() error{in.addDatacenter, in.addHosts, in.addDatastores, in.addNetworks}
	for _, step := range steps {
		if err := step(); err != nil {
			return nil, err
		}
	}
	machines := fixture.Machines
	sort.SliceStable(machines, func(i, j int) bool { return machines[i].Number < machines[j].Number })
	for i := range machines {
		if err := in.addMachine(&machines[i]); err != nil {
			return nil, fmt.Errorf("VM %s: %w", machines[i].Name, err)
		}
	}
	for i := 0; i < fixture.SyntheticCount; i++ {
		if err := in.addSynthetic(i); err != nil {
			return nil, fmt.Errorf("synthetic VM %d: %w", i, err)
		}
	}
	return in, nil
}

func (in *Inventory) addDatacenter() error {
	root := in.ctx.Map.Get(simulatorRoot(in.ctx)).(*simulator.Folder)
	body := root.CreateDatacenter(in.ctx, &types.CreateDatacenter{
		This: root.Self, Name: in.fixture.Datacenter,
	})
	if err := faultOf(body); err != nil {
		return err
	}
	ref := body.(*methods.CreateDatacenterBody).Res.Returnval
	in.dc = in.ctx.Map.Get(ref).(*simulator.Datacenter)
	in.folders[""] = in.ctx.Map.Get(in.dc.VmFolder).(*simulator.Folder)
	return nil
}

func simulatorRoot(ctx *simulator.Context) types.ManagedObjectReference {
	for _, entity := range ctx.Map.All("Folder") {
		if entity.Entity().Parent == nil {
			return entity.Reference()
		}
	}
	panic("the simulator has no root folder")
}

func (in *Inventory) addHosts() error {
	folder := in.ctx.Map.Get(in.dc.HostFolder).(*simulator.Folder)
	for _, name := range in.fixture.Hosts {
		body := folder.AddStandaloneHostTask(in.ctx, &types.AddStandaloneHost_Task{
			This:         folder.Self,
			Spec:         types.HostConnectSpec{HostName: name},
			AddConnected: true,
		})
		if err := faultOf(body); err != nil {
			return err
		}
		result, err := in.wait(body.(*methods.AddStandaloneHost_TaskBody).Res.Returnval)
		if err != nil {
			return fmt.Errorf("host %s: %w", name, err)
		}
		ref := result.(types.ManagedObjectReference)
		in.hosts = append(in.hosts, in.ctx.Map.Get(ref).(*simulator.HostSystem))
	}
	parent := in.ctx.Map.Get(*in.hosts[0].Parent).(*mo.ComputeResource)
	in.pool = *parent.ResourcePool
	return nil
}

func (in *Inventory) addDatastores() error {
	stores := []Datastore{in.fixture.Datastore}
	if in.fixture.SyntheticCount > 0 {
		stores = append(stores, Datastore{syntheticStore, in.fixture.SyntheticFolder})
	}
	for _, host := range in.hosts {
		system := in.ctx.Map.Get(*host.ConfigManager.DatastoreSystem).(*simulator.HostDatastoreSystem)
		for _, store := range stores {
			err := faultOf(system.CreateLocalDatastore(in.ctx, &types.CreateLocalDatastore{
				This: system.Self, Name: store.Name, Path: store.Folder,
			}))
			if err != nil {
				return fmt.Errorf("datastore %s in %s: %w", store.Name, store.Folder, err)
			}
		}
	}
	return nil
}

func (in *Inventory) addNetworks() error {
	known := map[string]bool{}
	for _, entity := range in.ctx.Map.All("Network") {
		known[entity.Entity().Name] = true
	}
	system := in.ctx.Map.Get(*in.hosts[0].ConfigManager.NetworkSystem).(*simulator.HostNetworkSystem)
	for _, machine := range in.fixture.Machines {
		for _, adapter := range machine.Adapters {
			if known[adapter.Network] {
				continue
			}
			known[adapter.Network] = true
			err := faultOf(system.AddPortGroup(in.ctx, &types.AddPortGroup{
				This:    system.Self,
				Portgrp: types.HostPortGroupSpec{Name: adapter.Network, VswitchName: virtualSwitch},
			}))
			if err != nil {
				return fmt.Errorf("network %s: %w", adapter.Network, err)
			}
		}
	}
	return nil
}

// folder returns the folder of that path below the datacenter, made if it is not there.
func (in *Inventory) folder(where string) (*simulator.Folder, error) {
	if found := in.folders[where]; found != nil {
		return found, nil
	}
	above, name := path.Split(where)
	parent, err := in.folder(strings.TrimSuffix(above, "/"))
	if err != nil {
		return nil, err
	}
	body := parent.CreateFolder(in.ctx, &types.CreateFolder{This: parent.Self, Name: name})
	if err := faultOf(body); err != nil {
		return nil, fmt.Errorf("folder %s: %w", where, err)
	}
	ref := body.(*methods.CreateFolderBody).Res.Returnval
	in.folders[where] = in.ctx.Map.Get(ref).(*simulator.Folder)
	return in.folders[where], nil
}

func (in *Inventory) addMachine(machine *Machine) error {
	folder, err := in.folder(machine.Folder)
	if err != nil {
		return err
	}
	spec := types.VirtualMachineConfigSpec{
		Name:     machine.Name,
		GuestId:  machine.GuestSystem,
		Uuid:     machine.BiosUUID,
		NumCPUs:  2,
		MemoryMB: 2048,
		Files: &types.VirtualMachineFileInfo{
			VmPathName: fmt.Sprintf("[%s] %s/%s.vmx", in.fixture.Datastore.Name, machine.Name, machine.Name),
		},
	}
	// Left by an earlier life; the simulator would refuse to write them again.
	home := path.Join(in.fixture.Datastore.Folder, machine.Name)
	for _, name := range []string{machine.Name + ".vmx", "vmware.log"} {
		if err := os.Remove(path.Join(home, name)); err != nil && !os.IsNotExist(err) {
			return err
		}
	}
	var devices object.VirtualDeviceList
	controller, err := devices.CreateSCSIController("pvscsi")
	if err != nil {
		return err
	}
	devices = append(devices, controller)
	for _, disk := range machine.Disks {
		device := devices.CreateDisk(
			controller.(types.BaseVirtualController), types.ManagedObjectReference{}, disk.Path)
		device.CapacityInBytes = disk.SizeBytes
		device.CapacityInKB = disk.SizeBytes / 1024
		devices = append(devices, device)
	}
	for _, adapter := range machine.Adapters {
		backing := &types.VirtualEthernetCardNetworkBackingInfo{}
		backing.DeviceName = adapter.Network
		card, err := devices.CreateEthernetCard("vmxnet3", backing)
		if err != nil {
			return err
		}
		card.(types.BaseVirtualEthernetCard).GetVirtualEthernetCard().MacAddress = adapter.MAC
		devices = append(devices, card)
	}
	for _, device := range devices {
		// Without a file operation: disks are there, and stay as they are.
		spec.DeviceChange = append(spec.DeviceChange, &types.VirtualDeviceConfigSpec{
			Operation: types.VirtualDeviceConfigSpecOperationAdd, Device: device,
		})
	}
	in.skipTo(machine.Number)
	vm, err := in.create(folder, spec)
	if err != nil {
		return err
	}
	if machine.IsOn {
		in.turnOn(vm)
	}
	return nil
}

func (in *Inventory) addSynthetic(index int) error {
	name := fmt.Sprintf("synthetic-%04d", index)
	spec := types.VirtualMachineConfigSpec{
		Name:    name,
		GuestId: string(types.VirtualMachineGuestOsIdentifierDebian12_64Guest),
		Files: &types.VirtualMachineFileInfo{
			VmPathName: fmt.Sprintf("[%s] %s/%s.vmx", syntheticStore, name, name),
		},
	}
	var devices object.VirtualDeviceList
	controller, err := devices.CreateSCSIController("pvscsi")
	if err != nil {
		return err
	}
	disk := devices.CreateDisk(controller.(types.BaseVirtualController),
		types.ManagedObjectReference{}, fmt.Sprintf("[%s] %s/disk.vmdk", syntheticStore, name))
	disk.CapacityInBytes = syntheticBytes
	disk.CapacityInKB = syntheticBytes / 1024
	spec.DeviceChange, err = object.VirtualDeviceList{controller, disk}.ConfigSpec(
		types.VirtualDeviceConfigSpecOperationAdd)
	if err != nil {
		return err
	}
	if index == 0 {
		in.skipTo(syntheticNumber)
	}
	vm, err := in.create(in.folders[""], spec)
	if err != nil {
		return err
	}
	in.turnOn(vm)
	return nil
}

// skipTo spends numbers until the next object gets this one. A moid then depends on nothing but
// the VM: after a restart without some other VM it is the same, as in a real vCenter.
func (in *Inventory) skipTo(number int64) {
	spend := func() string {
		return in.ctx.Map.NewEntity(&mo.VirtualMachine{}).Reference().Value
	}
	spent, err := strconv.ParseInt(strings.TrimPrefix(spend(), "vm-"), 10, 64)
	if err != nil {
		panic(err)
	}
	for ; spent < number-1-numbersOfTask; spent++ {
		spend()
	}
}

// numbersOfTask are spent between the call of CreateVMTask and the VM that it makes.
const numbersOfTask = 1

func (in *Inventory) create(
	folder *simulator.Folder, spec types.VirtualMachineConfigSpec,
) (*simulator.VirtualMachine, error) {
	host := in.hosts[0].Self
	body := folder.CreateVMTask(in.ctx, &types.CreateVM_Task{
		This: folder.Self, Config: spec, Pool: in.pool, Host: &host,
	})
	result, err := in.wait(body.(*methods.CreateVM_TaskBody).Res.Returnval)
	if err != nil {
		return nil, err
	}
	ref := result.(types.ManagedObjectReference)
	return in.ctx.Map.Get(ref).(*simulator.VirtualMachine), nil
}

func (in *Inventory) turnOn(vm *simulator.VirtualMachine) {
	in.ctx.Map.Update(in.ctx, vm, []types.PropertyChange{
		{Name: "runtime.powerState", Val: types.VirtualMachinePowerStatePoweredOn},
		{Name: "summary.runtime.powerState", Val: types.VirtualMachinePowerStatePoweredOn},
	})
}

// wait returns a task's result; the simulator's own way sleeps 10 ms at a time.
func (in *Inventory) wait(ref types.ManagedObjectReference) (any, error) {
	task := in.ctx.Map.Get(ref).(*simulator.Task)
	apart := &simulator.Context{Map: in.ctx.Map}
	for {
		var info types.TaskInfo
		in.ctx.Map.WithLock(apart, task, func() { info = task.Info })
		switch info.State {
		case types.TaskInfoStateSuccess:
			return info.Result, nil
		case types.TaskInfoStateError:
			return nil, fmt.Errorf("%s: %+v", info.Error.LocalizedMessage, info.Error.Fault)
		}
		time.Sleep(taskPoll)
	}
}

func faultOf(body soap.HasFault) error {
	if fault := body.Fault(); fault != nil {
		return fmt.Errorf("%s: %T", fault.String, fault.VimFault())
	}
	return nil
}
