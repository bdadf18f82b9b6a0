package main

import (
	"encoding/json"
	"fmt"
	"os"
	"sync"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"
)

const changesMax = 4096

// Power tells of each change of a VM's power on standard output, a line of JSON each, and lets
// the VM's guest details follow: a guest that is off has no addresses.
type Power struct {
	self    types.ManagedObjectReference
	ctx     *simulator.Context
	known   map[string]*Machine // by moid
	changes chan change
	ended   sync.WaitGroup
}

type change struct {
	ref   types.ManagedObjectReference
	state types.VirtualMachinePowerState
	isCut bool
}

func watchPower(ctx *simulator.Context, fixture *Fixture) *Power {
	power := &Power{
		self:    types.ManagedObjectReference{Type: "UnderstudyPower", Value: "power"},
		ctx:     ctx,
		known:   map[string]*Machine{},
		changes: make(chan change, changesMax),
	}
	byName := map[string]*Machine{}
	for i := range fixture.Machines {
		byName[fixture.Machines[i].Name] = &fixture.Machines[i]
	}
	for _, entity := range ctx.Map.All("VirtualMachine") {
		vm := entity.(*simulator.VirtualMachine)
		if machine := byName[vm.Name]; machine != nil {
			power.known[vm.Self.Value] = machine
			power.showGuest(vm, machine, vm.Runtime.PowerState)
		}
	}
	ctx.Map.AddHandler(power)
	power.ended.Add(1)
	go power.run()
	return power
}

// Reference makes a handler of the registry of it.
func (p *Power) Reference() types.ManagedObjectReference { return p.self }

// PutObject is called for new objects.
func (p *Power) PutObject(*simulator.Context, mo.Reference) {}

// RemoveObject is called for objects that go.
func (p *Power) RemoveObject(*simulator.Context, types.ManagedObjectReference) {}

// UpdateObject is called under the object's lock: what takes long happens elsewhere.
func (p *Power) UpdateObject(_ *simulator.Context, obj mo.Reference, all []types.PropertyChange) {
	if obj.Reference().Type != "VirtualMachine" {
		return
	}
	var state types.VirtualMachinePowerState
	hasDevices := false
	for _, one := range all {
		if told, ok := one.Val.(types.VirtualMachinePowerState); ok && one.Name == "runtime.powerState" {
			state = told
		}
		hasDevices = hasDevices || one.Name == "config.hardware.device"
	}
	if state != "" {
		// The simulator's PowerOffVM_Task disconnects devices in the same step, its ShutdownGuest does not.
		isCut := hasDevices && state == types.VirtualMachinePowerStatePoweredOff
		p.changes <- change{obj.Reference(), state, isCut}
	}
}

func (p *Power) run() {
	defer p.ended.Done()
	out := json.NewEncoder(os.Stdout)
	apart := &simulator.Context{Context: p.ctx.Context, Map: p.ctx.Map}
	for change := range p.changes {
		machine := p.known[change.ref.Value]
		vm, isThere := p.ctx.Map.Get(change.ref).(*simulator.VirtualMachine)
		if machine == nil || !isThere {
			continue
		}
		isOn := change.state == types.VirtualMachinePowerStatePoweredOn
		told := map[string]any{"machine": machine.Name, "is_on": isOn, "is_cut": change.isCut}
		if err := out.Encode(told); err != nil {
			fmt.Fprintln(os.Stderr, "cannot tell of power:", err)
		}
		p.ctx.Map.WithLock(apart, vm, func() { p.showGuest(vm, machine, change.state) })
	}
}

func (p *Power) showGuest(
	vm *simulator.VirtualMachine, machine *Machine, state types.VirtualMachinePowerState,
) {
	running := types.VirtualMachineToolsRunningStatusGuestToolsNotRunning
	status := types.VirtualMachineToolsStatusToolsNotRunning
	hostname, first := "", ""
	adapters := append([]types.GuestNicInfo{}, vm.Guest.Net...)
	isOn := state == types.VirtualMachinePowerStatePoweredOn
	if isOn {
		running = types.VirtualMachineToolsRunningStatusGuestToolsRunning
		status = types.VirtualMachineToolsStatusToolsOk
		hostname = machine.Hostname
	}
	for i := range adapters {
		adapters[i].Connected, adapters[i].IpAddress = isOn, nil
		if isOn && i < len(machine.Adapters) {
			adapters[i].IpAddress = machine.Adapters[i].Addresses
			if first == "" && len(adapters[i].IpAddress) > 0 {
				first = adapters[i].IpAddress[0]
			}
		}
	}
	p.ctx.Map.Update(p.ctx, vm, []types.PropertyChange{
		{Name: "guest.toolsRunningStatus", Val: string(running)},
		{Name: "guest.toolsStatus", Val: status},
		{Name: "guest.hostName", Val: hostname},
		{Name: "guest.ipAddress", Val: first},
		{Name: "guest.net", Val: adapters},
		{Name: "summary.guest.hostName", Val: hostname},
		{Name: "summary.guest.ipAddress", Val: first},
		{Name: "summary.guest.toolsRunningStatus", Val: string(running)},
	})
}
