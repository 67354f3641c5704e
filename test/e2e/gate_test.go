package e2e

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"

	admissionv1 "k8s.io/api/admission/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// This program, under the name gate in an image, is the admission webhook of
// the chart of that name: it passes no red ConfigMap and stamps the others.
func init() {
	if filepath.Base(os.Args[0]) != "gate" {
		return
	}
	http.HandleFunc("/ready", func(http.ResponseWriter, *http.Request) {})
	http.HandleFunc("/validate", review(func(cm corev1.ConfigMap, answer *admissionv1.AdmissionResponse) {
		if cm.Data["color"] == "red" {
			answer.Allowed, answer.Result = false, &metav1.Status{Message: "nothing red passes the gate", Code: http.StatusForbidden}
		}
	}))
	http.HandleFunc("/mutate", review(func(_ corev1.ConfigMap, answer *admissionv1.AdmissionResponse) {
		kind := admissionv1.PatchTypeJSONPatch
		answer.PatchType, answer.Patch = &kind, []byte(`[{"op":"add","path":"/data/stamp","value":"passed"}]`)
	}))
	fmt.Println(http.ListenAndServeTLS(os.Args[1], os.Args[2], os.Args[3], nil))
	os.Exit(1)
}

func review(decide func(corev1.ConfigMap, *admissionv1.AdmissionResponse)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		var asked admissionv1.AdmissionReview
		var cm corev1.ConfigMap
		err := json.NewDecoder(r.Body).Decode(&asked)
		if err == nil && asked.Request != nil {
			err = json.Unmarshal(asked.Request.Object.Raw, &cm)
		}
		if err != nil || asked.Request == nil {
			http.Error(w, fmt.Sprint("no review: ", err), http.StatusBadRequest)
			return
		}
		answer := &admissionv1.AdmissionResponse{UID: asked.Request.UID, Allowed: true}
		decide(cm, answer)
		json.NewEncoder(w).Encode(admissionv1.AdmissionReview{TypeMeta: asked.TypeMeta, Response: answer})
	}
}
