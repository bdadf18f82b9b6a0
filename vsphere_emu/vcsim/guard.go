package main

import (
	"crypto/subtle"
	"net/http"
	"strings"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// guarded lets only who is logged in reach files. The simulator would serve the datastore, which
// holds the guests' disks, to anyone.
func guarded(next http.Handler, ctx *simulator.Context, fixture *Fixture) http.Handler {
	sessions := ctx.Map.SessionManager()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		for _, prefix := range []string{"/folder", "/nfc", "/guestFile"} {
			if strings.HasPrefix(r.URL.Path, prefix) && !isKnown(r, ctx, sessions, fixture) {
				w.Header().Set("WWW-Authenticate", `Basic realm="vCenter"`)
				http.Error(w, "log in first", http.StatusUnauthorized)
				return
			}
		}
		next.ServeHTTP(w, r)
	})
}

func isKnown(
	r *http.Request, ctx *simulator.Context, sessions *simulator.SessionManager, fixture *Fixture,
) bool {
	if user, password, ok := r.BasicAuth(); ok {
		return same(user, fixture.User) && same(password, fixture.Password)
	}
	cookie, err := r.Cookie(soap.SessionCookieName)
	if err != nil {
		return false
	}
	body := sessions.SessionIsActive(ctx, &types.SessionIsActive{
		SessionID: strings.Trim(cookie.Value, `"`), UserName: fixture.User,
	})
	told, ok := body.(*methods.SessionIsActiveBody)
	return ok && told.Res != nil && told.Res.Returnval
}

func same(told, expected string) bool {
	return subtle.ConstantTimeCompare([]byte(told), []byte(expected)) == 1
}
