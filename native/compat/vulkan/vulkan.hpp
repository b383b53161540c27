// Found ahead of the system's header while llama.cpp's Vulkan backend is compiled (native/programs/gpu.cmake).
//
// The backend names types of VK_EXT_layer_settings, which the header has since version 1.3.272; Debian 12 has 1.3.239.
// It uses them for the validation layer. Other drivers skip a structure that they do not know.
#include_next <vulkan/vulkan.hpp>

#if defined(VULKAN_HPP_NAMESPACE) && !defined(VK_EXT_layer_settings) && !defined(TSCONV_LAYER_SETTINGS)
#define TSCONV_LAYER_SETTINGS
#include <cstdint>
#include <vector>

namespace VULKAN_HPP_NAMESPACE {

enum class LayerSettingTypeEXT { eBool32 = 0 };

struct LayerSettingEXT {
    const char * pLayerName;
    const char * pSettingName;
    LayerSettingTypeEXT type;
    uint32_t valueCount;
    const void * pValues;
};

struct LayerSettingsCreateInfoEXT {
    explicit LayerSettingsCreateInfoEXT(const std::vector<LayerSettingEXT> & settings)
        : settingCount(static_cast<uint32_t>(settings.size())), pSettings(settings.data()) {}

    VkStructureType sType = static_cast<VkStructureType>(1000496000); // VK_STRUCTURE_TYPE_LAYER_SETTINGS_CREATE_INFO_EXT
    const void * pNext = nullptr;
    uint32_t settingCount;
    const LayerSettingEXT * pSettings;
};

} // namespace VULKAN_HPP_NAMESPACE
#endif
