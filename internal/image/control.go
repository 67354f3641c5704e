package image

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strconv"
)

// message is one line of what the Handler answers to a request that takes
// time: progress any number of times, then images or an error.
type message struct {
	Progress *Progress    `json:"progress,omitempty"`
	Images   []Image      `json:"images,omitempty"`
	Error    *remoteError `json:"error,omitempty"`
}

// remoteError is an error on its way from Handler to Client.
type remoteError struct {
	Message string `json:"message"`
	Kind    string `json:"kind,omitempty"`
}

// kinds are the errors that a caller may tell apart, and their HTTP status.
var kinds = map[string]struct {
	err    error
	status int
}{
	"not found": {ErrNotFound, http.StatusNotFound},
	"broken":    {ErrBroken, http.StatusUnprocessableEntity},
	"name":      {ErrName, http.StatusBadRequest},
	"held":      {ErrHeld, http.StatusConflict},
}

func toRemote(err error) (*remoteError, int) {
	for kind, k := range kinds {
		if errors.Is(err, k.err) {
			return &remoteError{err.Error(), kind}, k.status
		}
	}
	return &remoteError{Message: err.Error()}, http.StatusInternalServerError
}

func (r *remoteError) local() error { return failed(kinds[r.Kind].err, nil, "%s", r.Message) }

// Handler lets other processes of this machine use the store, which only one
// can have open; Client is its counterpart. It asks for no credentials: serve
// it where only those who may change images can connect.
func Handler(l *Local) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /images", func(w http.ResponseWriter, r *http.Request) {
		all, err := l.List(r.Context())
		answer(w, all, err)
	})
	mux.HandleFunc("DELETE /images", func(w http.ResponseWriter, r *http.Request) {
		force, _ := strconv.ParseBool(r.FormValue("force"))
		answer(w, nil, l.Remove(r.Context(), r.FormValue("name"), force))
	})
	mux.HandleFunc("POST /images/collect", func(w http.ResponseWriter, r *http.Request) {
		answer(w, nil, l.Collect(r.Context()))
	})
	mux.HandleFunc("GET /images/save", func(w http.ResponseWriter, r *http.Request) {
		name := r.FormValue("name")
		if _, err := l.Get(r.Context(), name); err != nil {
			answer(w, nil, err)
			return
		}
		if err := l.Save(r.Context(), name, w); err != nil {
			l.log.Warn("image was not saved whole", "image", name, "err", err)
			panic(http.ErrAbortHandler) // the client must not take it for whole
		}
	})
	mux.HandleFunc("POST /images/load", stream(func(r *http.Request) ([]Image, error) {
		return l.Load(r.Context(), r.Body)
	}))
	mux.HandleFunc("POST /images/import", stream(func(r *http.Request) ([]Image, error) {
		var cfg Config
		if err := json.Unmarshal([]byte(r.URL.Query().Get("config")), &cfg); err != nil {
			return nil, err
		}
		img, err := l.Import(r.Context(), r.URL.Query().Get("name"), r.Body, cfg)
		return []Image{img}, err
	}))
	mux.HandleFunc("POST /images/pull", stream(func(r *http.Request) ([]Image, error) {
		var auths []Auth
		if err := json.NewDecoder(r.Body).Decode(&auths); err != nil {
			return nil, err
		}
		name := r.URL.Query().Get("name")
		img, err := l.Pull(r.Context(), name, l.adminAuths(name, auths))
		return []Image{img}, err
	}))
	mux.HandleFunc("POST /images/push", stream(func(r *http.Request) ([]Image, error) {
		var auths []Auth
		if err := json.NewDecoder(r.Body).Decode(&auths); err != nil {
			return nil, err
		}
		query := r.URL.Query()
		to, err := l.PushName(query.Get("to"), query.Get("namespace"))
		if err != nil {
			return nil, err
		}
		digest, err := l.Push(r.Context(), query.Get("name"), to, l.adminAuths(to, auths))
		return []Image{{Name: to, Digest: digest}}, err
	}))
	return mux
}

func answer(w http.ResponseWriter, images []Image, err error) {
	w.Header().Set("Content-Type", "application/json")
	m := message{Images: images}
	if err != nil {
		var status int
		m.Error, status = toRemote(err)
		w.WriteHeader(status)
	}
	json.NewEncoder(w).Encode(m)
}

// stream answers with a line of JSON for each step of do. The status is always
// 200: it is sent before the end is known.
func stream(do func(*http.Request) ([]Image, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		control := http.NewResponseController(w)
		control.EnableFullDuplex() // HTTP/2 always is, and says so by an error
		w.Header().Set("Content-Type", "application/jsonl")
		send := func(m message) {
			json.NewEncoder(w).Encode(m)
			control.Flush()
		}
		send(message{Progress: &Progress{}})

		// Steps are dropped while the client does not read: a download that
		// others wait for must not wait for it.
		steps, done := make(chan Progress, 1), make(chan message, 1)
		ctx := WithProgress(r.Context(), func(p Progress) {
			select {
			case steps <- p:
			default:
			}
		})
		go func() {
			images, err := do(r.WithContext(ctx))
			m := message{Images: images}
			if err != nil {
				m.Error, _ = toRemote(err)
			}
			done <- m
		}()
		for {
			select {
			case p := <-steps:
				send(message{Progress: &p})
			case m := <-done:
				send(m)
				// A client that is still sending sees a broken connection
				// instead of the answer when the rest is left unread.
				io.Copy(io.Discard, r.Body)
				return
			}
		}
	}
}
