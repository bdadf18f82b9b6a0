package main

import (
	"encoding/json"
	"fmt"
	"os"
)

// Fixture is what the vCenter holds when it starts. vsphere_emu/vcenter.py writes it.
type Fixture struct {
	Listen             string    `json:"listen"`
	User               string    `json:"user"`
	Password           string    `json:"password"`
	Certificate        string    `json:"certificate"`
	Key                string    `json:"key"`
	InstanceUUID       string    `json:"instance_uuid"`
	SessionIdleSeconds int       `json:"session_idle_seconds"`
	Datacenter         string    `json:"datacenter"`
	Hosts              []string  `json:"hosts"`
	Datastore          Datastore `json:"datastore"`
	Machines           []Machine `json:"machines"`
	SyntheticCount     int       `json:"synthetic_count"`
	SyntheticFolder    string    `json:"synthetic_folder"`
}

// Datastore is a folder that shows under a name.
type Datastore struct {
	Name   string `json:"name"`
	Folder string `json:"folder"`
}

// Machine is a VM. Its disks are there already.
type Machine struct {
	Name        string    `json:"name"`
	Number      int64     `json:"number"` // of its moid, rising through the list
	BiosUUID    string    `json:"bios_uuid"`
	GuestSystem string    `json:"guest_system"`
	Hostname    string    `json:"hostname"`
	Folder      string    `json:"folder"` // path below the datacenter, "" for none
	IsOn        bool      `json:"is_on"`
	Disks       []Disk    `json:"disks"`
	Adapters    []Adapter `json:"adapters"`
}

// Disk is a VMDK in the datastore.
type Disk struct {
	Path      string `json:"path"`
	SizeBytes int64  `json:"size_bytes"`
}

// Adapter is a network adapter and the addresses that the guest has on it while it is on.
type Adapter struct {
	Network   string   `json:"network"`
	MAC       string   `json:"mac"`
	Addresses []string `json:"addresses"`
}

func readFixture(path string) (*Fixture, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	decoder := json.NewDecoder(file)
	decoder.DisallowUnknownFields()
	fixture := new(Fixture)
	if err := decoder.Decode(fixture); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return fixture, nil
}
