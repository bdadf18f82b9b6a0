// Command vcsim plays a vCenter: govmomi's simulator, holding what a fixture file says.
//
// It prints {"ready": "host:port"} when it answers, then a line for each change of a VM's power,
// and ends at SIGTERM or SIGINT.
package main

import (
	"crypto/tls"
	"encoding/json"
	"fmt"
	"net/url"
	"os"
	"os/signal"
	"syscall"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/types"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: vcsim FIXTURE.json")
		os.Exit(2)
	}
	if err := run(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "vcsim:", err)
		os.Exit(1)
	}
}

func run(path string) error {
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, syscall.SIGINT)
	fixture, err := readFixture(path)
	if err != nil {
		return err
	}
	certificate, err := tls.LoadX509KeyPair(fixture.Certificate, fixture.Key)
	if err != nil {
		return err
	}
	model := &simulator.Model{
		ServiceContent: simulator.VPX().ServiceContent,
		RootFolder:     simulator.VPX().RootFolder,
	}
	model.ServiceContent.About.InstanceUuid = fixture.InstanceUUID
	if err := model.Create(); err != nil {
		return err
	}
	defer model.Remove()
	ctx := model.Service.Context
	ctx.Map.OptionManager().UpdateOptions(&types.UpdateOptions{
		ChangedValue: []types.BaseOptionValue{&types.OptionValue{
			Key:   "config.vmacore.soap.sessionTimeout",
			Value: fmt.Sprintf("%ds", fixture.SessionIdleSeconds),
		}},
	})
	if _, err := build(ctx, fixture); err != nil {
		return err
	}
	watchPower(ctx, fixture)
	model.Service.TLS = &tls.Config{
		Certificates: []tls.Certificate{certificate},
		MinVersion:   tls.VersionTLS12,
	}
	model.Service.Listen = &url.URL{
		Host: fixture.Listen,
		User: url.UserPassword(fixture.User, fixture.Password),
	}
	server := model.Service.NewServer()
	defer server.Close()
	server.Config.Handler = guarded(server.Config.Handler, ctx, fixture)
	told := map[string]string{"ready": server.Listener.Addr().String()}
	if err := json.NewEncoder(os.Stdout).Encode(told); err != nil {
		return err
	}
	<-stop
	return nil
}
